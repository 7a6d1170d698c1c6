"""What searches and pictures take their scores from: trained predictors, or measured sensitivities. Higher is better."""

import numpy as np
import torch
from tqdm import tqdm

from autobuild.predictor import GraphTensors, load_predictor, one_thread, side_by_side
from autobuild.search import make_part, parts_of_weights, variants

NODES_AT_ONCE = 30_000  # of small graphs side by side, to bound memory


class LearnedScores:
    """Of the predictors of all folds; `states` as they were trained."""

    @torch.no_grad()
    def __init__(self, space, states):
        self.space = space
        self.tensors = GraphTensors(space)
        self.predictors = [load_predictor(self.tensors, state) for state in states]
        self.tables = [predictor.embedding(self.tensors) for predictor in self.predictors]  # [N, M, WIDTH] each
        self.alone = [table[self.tensors.weights].sum(dim=2) for table in self.tables]  # [W, M] damage of each weight

    def of_weights(self):
        """The paper's scores [W, M] of every weight by itself; NaN where the labels have not seen a method."""
        scores = sum(map(published, self.predictors, [0] * len(self.predictors), self.alone))
        return np.where(self.space.is_known, scores.numpy(), np.nan)

    def parts(self):
        """The units, each variant with what it adds to the predicted target, but for a constant: mean over folds."""
        return self._parts(as_published=False)

    def published_parts(self):
        """The units with the paper's scores."""
        return self._parts(as_published=True)

    def _parts(self, as_published):
        with one_thread():
            units = tqdm(self.space.units, desc="subgraphs", unit="subgraph", leave=False)
            return [self._part(unit, as_published) for unit in units]

    @torch.no_grad()
    def _part(self, unit, as_published):
        weights = np.array([self.space.place[node] for node in unit.weights])
        codes = variants(self.space, weights)
        scores = torch.zeros(len(codes))
        for number, predictor in enumerate(self.predictors):
            damage = self._damage(number, unit, codes)
            if as_published:
                scores += published(predictor, unit.hops, damage)
                continue
            each = predictor.contributions(0, self.alone[number][weights, codes].sum(dim=1))
            each = each + (predictor.contributions(unit.hops, damage) if unit.hops else 0)
            scores += each / len(self.predictors)
        return make_part(self.space, weights, codes, scores.numpy())

    def _damage(self, number, unit, codes):
        """Damage [V] of a unit's variants, codes [V, K], by predictor `number`.

        It depends on the nodes within the unit's hops before its root. Weights of other units among them count as the
        mean of their methods.
        """
        table = self.tables[number]
        nodes = nodes_before(unit.root, unit.hops)
        places = torch.tensor([self.space.graph.number[node.name] for node in nodes])
        found = table[places].mean(dim=1).expand(len(codes), -1, -1).clone()  # [V, n, WIDTH]
        own = [nodes.index(node) for node in unit.weights]
        found[:, own] = table[places[own], torch.from_numpy(codes)]
        edges = [
            (nodes.index(source), place) for place, node in enumerate(nodes) for source in node.sources if source in nodes
        ]
        edges = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
        damages = []
        for each in found.split(max(1, NODES_AT_ONCE // len(nodes))):
            together = side_by_side(edges, len(nodes), len(each))
            last = self.predictors[number].hops(each.flatten(0, 1), together, unit.hops)[-1]
            damages.append(last.view(*each.shape)[:, 0].sum(dim=1))
        return torch.cat(damages)


def published(predictor, hop, damage):
    """The paper's score: standardized over the subgraphs of that hop, weighted by the fold's rank correlation there."""
    return -(damage - predictor.hop_mean[hop]) / predictor.hop_std[hop] * predictor.hop_srcc[hop]


def nodes_before(root, hops):
    """The nodes within `hops` edges before a node, itself first."""
    found = [root]
    front = [root]
    for _ in range(hops):
        front = [source for node in front for source in node.sources if source not in found]
        front = list(dict.fromkeys(front))
        found += front
    return found


class MeasuredScores:
    """Of the change of the denoiser's output [W, M] under each weight's methods: they add up."""

    def __init__(self, space, changes):
        self.space, self.changes = space, changes

    def of_weights(self):
        return -self.changes

    def parts(self):
        """A part for each weight."""
        return parts_of_weights(self.space, -self.changes)

    def published_parts(self):
        """The units, a variant's score the sum of its weights'."""
        return [self._part(np.array([self.space.place[node] for node in unit.weights])) for unit in self.space.units]

    def _part(self, weights):
        codes = variants(self.space, weights)
        return make_part(self.space, weights, codes, -self.changes[weights, codes].sum(axis=1))
