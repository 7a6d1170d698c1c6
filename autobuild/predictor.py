"""The predictor: a graph neural network that reads a configuration off the denoiser's graph and ranks it.

After Mills et al. (2025), section 4, and AutoBuild (Mills et al., 2024): an embedding of each node, four GATv2 layers
(Brody et al., 2022) with residual connections, 64 wide. What the layers up to hop h make of a node tells of the
subgraph within h edges before it.

Unlike the published one it measures damage. Embeddings are never negative, and a weight's starts in proportion to its
error, times a factor that is learned for its layer type, block and method; its L1 norm is the subgraph's damage, minus
that its score. The norm of a mean of such embeddings is the mean of their norms: a configuration's prediction is a sum
over its subgraphs, which is what a search needs. A few hundred labels cannot teach a free network that one small layer
of three hundred matters more than the rest; a factor per layer type they can.
"""

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from autobuild.space import NAMES
from quant.registry import ALGORITHMS, BITS, quantizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # it still asks for torch.jit
    from torch_geometric.nn import GATv2Conv

WIDTH = 64
HOPS = 4
LEVELS = HOPS + 1
LEAST_ERROR = 1e-12  # of which a logarithm is taken
SMALL = 0.1  # factor on the layers' first weights: at the start a subgraph is little more than its root
FIRST_SHARE = -1.5  # of a level in the prediction, before softplus


class GraphTensors:
    """A search space's graph as the network takes it: N nodes, W of them weights, M methods."""

    def __init__(self, space):
        graph = space.graph
        self.num_nodes = len(graph.nodes)
        self.edges = torch.tensor(graph.edges).T  # [2, E] source, target
        blocks = {name: number for number, name in enumerate(["", *graph.blocks])}
        self.block = torch.tensor([blocks[node.block] for node in graph.nodes])  # [N]
        types = {name: number for number, name in enumerate(sorted({node.layer_type for node in graph.nodes}))}
        self.layer_type = torch.tensor([types[node.layer_type] for node in graph.nodes])  # [N]
        self.num_blocks, self.num_types = len(blocks), len(types)
        self.weights = torch.tensor([graph.number[node.name] for node in graph.weights])  # [W]
        roots = [[graph.number[unit.root.name] for unit in space.units if unit.hops == hop] for hop in range(LEVELS)]
        roots[0] = self.weights.tolist()  # every weight is the root of a subgraph of itself
        self.roots = {hop: torch.tensor(nodes) for hop, nodes in enumerate(roots) if nodes}
        self.type_count = torch.bincount(self.layer_type[self.weights], minlength=self.num_types).clamp(min=1)
        self.numbers = torch.zeros(self.num_nodes, len(NAMES), 2)  # size over full precision's, log of the error
        self.relative_error = torch.zeros(self.num_nodes, len(NAMES))  # log, to the mean of the layer type
        sizes = torch.from_numpy(space.size_bytes / space.fp_bytes[:, None])
        errors = torch.from_numpy(space.errors).clamp(min=LEAST_ERROR)
        self.numbers[self.weights] = torch.stack([_standardized(sizes), _standardized(errors.log())], dim=-1)
        self.relative_error[self.weights] = self._relative(errors)

    def _relative(self, errors):
        of_type = self.layer_type[self.weights]
        means = torch.stack([errors[of_type == number].nanmean() for number in range(self.num_types)])
        return torch.nan_to_num((errors / means[of_type][:, None]).log()).float()


def _standardized(values):
    """Of mean 0 and variance 1; what is not known is the mean."""
    known = values[values.isfinite()]
    return torch.where(values.isfinite(), (values - known.mean()) / (known.std() + 1e-8), 0.0).float()


class NodeEmbedding(nn.Module):
    """Method, bits, size reduction, error, block and layer type of every node -> [N, M, WIDTH], never negative."""

    def __init__(self, tensors):
        super().__init__()
        self.method = nn.Embedding(len(ALGORITHMS) + 1, 5)
        self.bits = nn.Embedding(len(BITS) + 1, 5)
        self.numbers = nn.ModuleList([nn.Linear(1, 5), nn.Linear(1, 5)])
        self.block = nn.Embedding(tensors.num_blocks, 10)
        self.layer_type = nn.Embedding(tensors.num_types, 10)
        hidden = nn.Sequential(nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, WIDTH), nn.ReLU())
        self.mix = nn.Sequential(hidden, nn.Linear(WIDTH, WIDTH), nn.Softplus())
        self.factors = Factors(tensors)
        methods = [quantizer(name) for name in NAMES]
        self.algorithm_of = torch.tensor([ALGORITHMS.index(method.algorithm) for method in methods])
        self.bits_of = torch.tensor([BITS.index(method.bits) for method in methods])

    def forward(self, tensors):
        is_weight = torch.zeros(tensors.num_nodes, 1, dtype=torch.bool)
        is_weight[tensors.weights] = True
        method = torch.where(is_weight, self.algorithm_of, len(ALGORITHMS))  # [N, M]
        bits = torch.where(is_weight, self.bits_of, len(BITS))
        parts = [self.method(method), self.bits(bits)]
        parts += [layer(tensors.numbers[..., place, None]) for place, layer in enumerate(self.numbers)]
        for of_node in (self.block(tensors.block), self.layer_type(tensors.layer_type)):
            parts.append(of_node[:, None].expand(-1, len(NAMES), -1))
        factors = torch.where(is_weight, self.factors(tensors), 1.0)
        return self.mix(torch.cat(parts, dim=-1)) * factors[..., None]


class Factors(nn.Module):
    """How much of its error a weight's damage is: the factor of its layer type, block and method [N, M].

    At the start layer types of many weights and of few weigh the same over random configurations.
    """

    def __init__(self, tensors):
        super().__init__()
        # Logarithms, each a difference from the start, which weight decay pulls back to.
        self.start = -0.5 * tensors.type_count.log()
        self.of_type = nn.Parameter(torch.zeros(tensors.num_types))
        self.of_block = nn.Parameter(torch.zeros(tensors.num_blocks))
        self.of_method = nn.Parameter(torch.zeros(tensors.num_types, len(NAMES)))
        self.of_error = nn.Parameter(torch.zeros(1))

    def forward(self, tensors):
        of_node = (self.start + self.of_type)[tensors.layer_type] + self.of_block[tensors.block]  # [N]
        of_method = self.of_method[tensors.layer_type] + (1 + self.of_error) * tensors.relative_error  # [N, M]
        return (of_node[:, None] + of_method).exp()


class Predictor(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors
        self.embedding = NodeEmbedding(tensors)
        self.layers = nn.ModuleList(GATv2Conv(WIDTH, WIDTH, add_self_loops=False) for _ in range(HOPS))
        for layer in self.layers:
            layer.lin_l.weight.data *= SMALL
        self.shares = nn.Parameter(torch.full((LEVELS,), FIRST_SHARE))
        self.bias = nn.Parameter(torch.zeros(1))
        for name in ("level_mean", "hop_mean", "hop_srcc"):
            self.register_buffer(name, torch.zeros(LEVELS))
        for name in ("level_std", "hop_std"):
            self.register_buffer(name, torch.ones(LEVELS))

    def embed(self, codes):
        """Embeddings [C, N, WIDTH] of the nodes of configurations, method codes [C, W]."""
        table = self.embedding(self.tensors)
        nodes = table[:, 0].expand(len(codes), -1, -1).clone()
        nodes[:, self.tensors.weights] = table[self.tensors.weights, codes]
        return nodes

    def hops(self, nodes, edges):
        """Embeddings [nodes, WIDTH] after each hop, 0 to HOPS; `edges` [2, E] with a self-loop for each node."""
        found = [nodes]
        for layer in self.layers:
            found.append(found[-1] + torch.relu(layer(found[-1], edges)))
        return found

    def damages(self, codes):
        """Of configurations, codes [C, W], the norms [C, roots] of each level's subgraphs {hop: norms}."""
        nodes = self.embed(codes)
        count, size = nodes.shape[:2]
        found = self.hops(nodes.flatten(0, 1), side_by_side(self.tensors.edges, size, count))
        return {hop: found[hop].view(count, size, -1)[:, roots].sum(dim=2) for hop, roots in self.tensors.roots.items()}

    def forward(self, codes):
        """Predicted targets [C], standardized, of configurations, and their scores [C] at each level {hop: scores}."""
        damages = self.damages(codes)
        levels = {hop: (each.mean(dim=1) - self.level_mean[hop]) / self.level_std[hop] for hop, each in damages.items()}
        predicted = self.bias - sum(F.softplus(self.shares[hop]) * level for hop, level in levels.items())
        return predicted, {hop: -level for hop, level in levels.items()}

    def contributions(self, hop, norms):
        """What subgraphs with these damages add to the prediction of a configuration, but for a constant."""
        share = F.softplus(self.shares[hop]) / (self.level_std[hop] * len(self.tensors.roots[hop]))
        return -share * norms

    @torch.no_grad()
    def note_damages(self, codes, batch, levels=False):
        """Keep mean and spread of the subgraphs' damages over configurations; of the levels' too, before training."""
        found = [self.damages(each) for each in codes.split(batch)]
        for hop in self.tensors.roots:
            damages = torch.cat([each[hop] for each in found])
            self.hop_mean[hop], self.hop_std[hop] = damages.mean(), damages.std() + 1e-12
            if levels:
                self.level_mean[hop], self.level_std[hop] = damages.mean(), damages.mean(dim=1).std() + 1e-12


def side_by_side(edges, size, count):
    """The edges [2, E] of `count` equal graphs of `size` nodes, a self-loop added to each node."""
    edges = torch.cat([edges, torch.arange(size).expand(2, -1)], dim=1)
    return (edges[:, None] + size * torch.arange(count)[None, :, None]).flatten(1)


@contextlib.contextmanager
def one_thread():
    """Small graphs are not worth sharing out: threads wait for one another longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_predictor(tensors, state):
    predictor = Predictor(tensors)
    predictor.load_state_dict(state)
    return predictor.eval()
