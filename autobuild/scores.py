"""What searches and pictures take their scores from: trained predictors, or measured sensitivities. Higher is better."""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from autobuild.exchanges import shortest_sum
from autobuild.predictor import WIDTH, GraphTensors, load_predictor, one_thread
from autobuild.search import best_within, make_decision, variants


class LearnedScores:
    """Of the predictors of all folds; `states` as they were trained."""

    found = None  # what is chosen is the best there is

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

    def best_within(self, avg_bits, budgets=()):
        """Codes [W] of the best prediction with at most so many average bits and within other budgets."""
        return best_within(self.space, self.decisions(), avg_bits, budgets)

    def decisions(self):
        """The units, each variant with what it adds to the predicted target, but for a constant: mean over folds."""
        return self._decisions(as_published=False)

    def published_decisions(self):
        """The units with the paper's scores."""
        return self._decisions(as_published=True)

    def _decisions(self, as_published):
        with one_thread():
            units = tqdm(self.space.units, desc="subgraphs", unit="subgraph", leave=False)
            return [self._decision(unit, as_published) for unit in units]

    @torch.no_grad()
    def _decision(self, unit, as_published):
        weights = np.array([self.space.place[node] for node in unit.weights])
        codes = variants(self.space, weights)
        scores = torch.zeros(len(codes))
        for number, predictor in enumerate(self.predictors):
            damage = self._damage(number, unit)
            if as_published:
                scores += published(predictor, unit.hops, damage)
                continue
            each = predictor.contributions(0, self.alone[number][weights, codes].sum(dim=1))
            each = each + (predictor.contributions(unit.hops, damage) if unit.hops else 0)
            scores += each / len(self.predictors)
        return make_decision(self.space, weights, codes, scores.numpy())

    def _damage(self, number, unit):
        """Damage [V] of a unit's variants, in the order of `variants`, by predictor `number`.

        It depends on the nodes within the unit's hops before its root. Each of them, at each hop, depends on few of the
        unit's weights: its embeddings are computed once per combination of those, not once per variant. They stand in
        a tensor with an axis per weight of the unit, of length 1 if they do not depend on it. Weights of other units
        count as the mean of their methods.
        """
        table, predictor, graph = self.tables[number], self.predictors[number], self.space.graph
        found = {node: table[graph.number[node.name]].mean(dim=0) for node in nodes_before(unit.root, unit.hops)}
        count = len(unit.weights)
        for axis, node in enumerate(unit.weights):
            known = torch.from_numpy(self.space.is_known[self.space.place[node]])
            found[node] = table[graph.number[node.name]][known].view(*_lengths(axis, count), WIDTH)
        for hop, layer in enumerate(predictor.layers[: unit.hops], start=1):
            found = {node: _passed(layer, node, found) for node in nodes_before(unit.root, unit.hops - hop)}
        lengths = [int(self.space.is_known[self.space.place[node]].sum()) for node in unit.weights]
        return found[unit.root].sum(dim=-1).expand(lengths).flatten()


def _lengths(axis, count):
    """Lengths of `count` axes, all 1 but that of `axis`, which is open."""
    return [-1 if each == axis else 1 for each in range(count)]


def _passed(layer, node, found):
    """A node's embedding after a GATv2 layer (Brody et al., 2022, equation 7), residual and all."""
    sources = [layer.lin_l(found[each]) for each in (*node.sources, node)]
    own = layer.lin_r(found[node])
    logits = [F.leaky_relu(source + own, layer.negative_slope) @ layer.att.flatten() for source in sources]
    shares = torch.stack(torch.broadcast_tensors(*logits)).softmax(dim=0)
    gathered = sum(share[..., None] * source for share, source in zip(shares, sources, strict=True))
    return found[node] + torch.relu(gathered + layer.bias)


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
    """Of the shifts [W, M, K] of the denoiser's output under each weight's methods, and their squared norms [W, M].

    The share `shrinkage` of inner products of the shifts is taken for noise.
    """

    def __init__(self, space, changes, shifts, shrinkage=0.0):
        self.space, self.changes, self.shifts, self.shrinkage = space, changes, shifts, shrinkage
        self.found = None

    def of_weights(self):
        return -self.changes

    def best_within(self, avg_bits, budgets=()):
        """Codes [W] of the shortest sum of shifts that is found with at most so many average bits, within other budgets.

        `found` tells how good it is (see exchanges.Found).
        """
        self.found = shortest_sum(self.space, self.shifts, avg_bits, self.shrinkage, budgets)
        return self.found.codes

    def published_decisions(self):
        """The units, a variant's score the sum of its weights'."""
        return [self._decision(np.array([self.space.place[node] for node in unit.weights])) for unit in self.space.units]

    def _decision(self, weights):
        codes = variants(self.space, weights)
        return make_decision(self.space, weights, codes, -self.changes[weights, codes].sum(axis=1))
