"""A denoiser as a directed acyclic graph: weights and what combines their outputs, as the predictor sees it.

The denoiser is exported (`torch.export`) on the meta device, so that no weight is needed and every architecture comes
through the same code. Of the exported operations these become nodes:

- a **weight**: each slot of a configuration; slots that share weights are one node, parts of a split weight are two,
  whose outputs are added;
- what combines several of them: **add**, **concat**, **mul**, and **matmul**, of which attention has two, queries by keys
  and probabilities by values;
- **norm**; and **adaln**, a norm whose output is shifted, or scaled and shifted, by a condition (Peebles and Xie, 2023).

Everything else (activations, reshapes, chunks, constants) passes its input on. A gate, a branch multiplied by a condition
before it joins the residual, belongs to the addition that it joins.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass, field

import torch

from models import geometry
from models.families import FAMILIES
from models.inputs import map_tensors
from quant.slots import find_slots

BLOCK = re.compile(r"(?:(?:\w*(?:blocks|resnets|attentions|samplers|layers)\.\d+|mid_block)(?:\.|$))+")
OPERATIONS = {
    "add": ("add", "add_", "sub", "lerp"),
    "mul": ("mul", "mul_", "div", "addcmul"),
    "concat": ("cat", "concat", "stack"),
    "matmul": ("matmul", "bmm", "baddbmm", "einsum"),
    "norm": ("layer_norm", "group_norm", "rms_norm", "native_layer_norm", "native_group_norm"),
}
KIND_OF = {name: kind for kind, names in OPERATIONS.items() for name in names}
ATTENTION = "scaled_dot_product_attention"
WEIGHT = "weight"


@dataclass(eq=False)
class Node:
    """A weight, or an operation; `sources` are the nodes whose outputs it reads."""

    name: str  # of a weight its configuration key, else its module's path and its kind
    kind: str  # weight, add, concat, matmul, norm, adaln or mul
    path: str  # of the module that it belongs to
    sources: list["Node"] = field(default_factory=list, repr=False)
    is_shared: bool = False  # its weights stand in several places

    @property
    def is_weight(self):
        return self.kind == WEIGHT

    @property
    def block(self):
        """Path of the innermost block that it is in, "" outside of any: transformer_blocks.3."""
        match = None if self.is_shared else BLOCK.match(self.path)
        return match.group().rstrip(".") if match else ""

    @property
    def layer_type(self):
        """What it is in its block: attn1.to_q; of an operation its kind."""
        if not self.is_weight:
            return self.kind
        return self.path.removeprefix(self.block).lstrip(".") + (" (skip)" if self.name.endswith("_0") else "")


@dataclass
class Unit:
    """A subgraph that is scored and chosen as a whole: an attention, a feed-forward, or a weight between two sums."""

    nodes: list[Node]  # the last is its root, which all others lead to
    hops: int  # steps from the farthest of them to the root

    @property
    def root(self):
        return self.nodes[-1]

    @property
    def weights(self):
        return [node for node in self.nodes if node.is_weight]


class DenoiserGraph:
    """Nodes in topological order."""

    def __init__(self, nodes):
        self.nodes = nodes
        self.number = {node.name: number for number, node in enumerate(nodes)}

    @property
    def edges(self):
        """(number of the source, number of the node) of all edges."""
        return [(self.number[source.name], self.number[node.name]) for node in self.nodes for source in node.sources]

    @property
    def weights(self):
        return [node for node in self.nodes if node.is_weight]

    @property
    def blocks(self):
        """Paths of the blocks, in order."""
        return list(dict.fromkeys(node.block for node in self.nodes if node.block))

    def counts(self):
        return Counter(node.kind for node in self.nodes)

    def units(self):
        """The units, in order of their roots: every weight is in one of them.

        Sums, modulations and concatenations end a unit, and so does a norm, unless of a weight's output; what is
        between them in one block and leads to one root belongs together. (Mills et al., 2025, score such subgraphs;
        theirs are listed by hand.)
        """
        inner = [node for node in self.nodes if not self._ends_unit(node)]
        readers = {node: [] for node in inner}
        for node in inner:
            for source in node.sources:
                if source in readers and source.block == node.block:
                    readers[source].append(node)
        root, hops = {}, {}
        for node in reversed(inner):
            roots = {root[reader] for reader in readers[node]}
            shared = len(roots) == 1
            root[node] = roots.pop() if shared else node
            hops[node] = 1 + max(hops[reader] for reader in readers[node]) if shared else 0
        members = {}
        for node in inner:
            members.setdefault(root[node], []).append(node)
        units = [Unit(nodes, max(hops[node] for node in nodes)) for nodes in members.values()]
        return sorted(units, key=lambda unit: self.number[unit.root.name])

    @staticmethod
    def _ends_unit(node):
        if node.kind == "norm":
            return not all(source.is_weight and source.block == node.block for source in node.sources)
        return node.kind in ("add", "adaln", "concat")


@functools.cache  # tracing takes seconds
def of_family(name):
    """The graph of a family's denoiser, real or embedded: both have the same layers."""
    denoiser, slots = slots_of_family(name)
    inputs = map_tensors(lambda tensor: tensor.to("meta"), geometry.example_inputs(name, denoiser))
    return trace(denoiser, inputs, slots)


def slots_of_family(name):
    """A family's denoiser at real size, without weights, and its slots."""
    with torch.device("meta"):
        denoiser = geometry.build(name)
    return denoiser, find_slots(denoiser, FAMILIES[name].slot_rules)


def trace(denoiser, inputs, slots):
    """The graph of a denoiser on the meta device, called with `inputs` {name: value}; `slots` as `find_slots` has them."""
    with torch.no_grad():
        program = torch.export.export(denoiser.eval(), (), inputs, strict=False)
    tracer = _Tracer(program, slots)
    return DenoiserGraph(_simplified(tracer.nodes, tracer.outputs))


class _Tracer:
    """Walks an exported program and notes which nodes each value comes from."""

    def __init__(self, program, slots):
        self.slots, self.slots_of = slots, {}  # {module path: its slots}
        for slot in slots.values():
            self.slots_of.setdefault(slot.module_path, []).append(slot)
        self.parameters = program.graph_signature.inputs_to_parameters
        self.nodes, self.names = [], Counter()
        self.weights = {}  # {file key: node}
        self.sources = {}  # {operation: nodes that its value comes from}
        for operation in program.graph.nodes:
            self.sources[operation] = self.visit(operation)
        self.outputs = self.sources[operation]  # of the last one, which returns

    def visit(self, operation):
        """The nodes that the operation's value comes from, a new one if it is to be one."""
        inputs = [self.sources[each] for each in operation.all_input_nodes]
        together = list(dict.fromkeys(node for nodes in inputs for node in nodes))
        if operation.op != "call_function":
            return together
        weight = self.weight_of(operation)
        if weight in self.slots_of:
            return [self.weight_node(weight, together)]
        if not together:
            return []
        name = getattr(operation.target, "__name__", str(operation.target)).split(".")[0]
        if name == ATTENTION:
            query, key, value, *_ = inputs
            scores = self.add_node("matmul", self.path_of(operation), [*query, *key])
            return [self.add_node("matmul", self.path_of(operation), [scores, *value])]
        kind = KIND_OF.get(name)
        if kind == "norm" or len(together) > 1:
            return [self.add_node(kind or name, self.path_of(operation), together)]
        return together

    def weight_of(self, operation):
        """Path of the layer whose weight a linear operation or convolution reads; None if it is neither."""
        if not re.match(r"linear|conv\dd|convolution|addmm", getattr(operation.target, "__name__", "")):
            return None
        names = [self.parameters.get(each.name, "") for each in operation.all_input_nodes]
        return next((name.removesuffix(".weight") for name in names if name.endswith(".weight")), None)

    def weight_node(self, path, sources):
        parts = []
        for slot in self.slots_of[path]:
            name = self.slots[slot.tie].file_key
            if name not in self.weights:
                self.weights[name] = Node(name, WEIGHT, path)
                self.nodes.append(self.weights[name])
            node = self.weights[name]
            node.is_shared |= slot.tie != slot.key
            node.sources += [source for source in sources if source not in node.sources]
            parts.append(node)
        return parts[0] if len(parts) == 1 else self.add_node("add", path, parts)

    def add_node(self, kind, path, sources):
        place = f"model.{path}.{kind}" if path else f"model.{kind}"
        node = Node(f"{place}_{self.names[place]}", kind, path, list(dict.fromkeys(sources)))
        self.names[place] += 1
        self.nodes.append(node)
        return node

    @staticmethod
    def path_of(operation):
        stack = operation.meta.get("nn_module_stack") or {"": ("", None)}
        return list(stack.values())[-1][0]


def _simplified(nodes, outputs):
    """The nodes with gates and modulations folded into one node each."""
    readers = Counter(source for node in nodes for source in node.sources) + Counter(outputs)
    gone = set()

    def only_here(node):
        return readers[node] == 1

    for node in nodes:
        if node.kind != "add":
            continue
        for product in [source for source in node.sources if source.kind == "mul" and only_here(source)]:
            # x * condition + condition is a modulation, residual + x * condition a gated branch.
            node.sources.remove(product)
            node.sources += [source for source in product.sources if source not in node.sources]
            gone.add(product)
        norms = [source for source in node.sources if source.kind == "norm" and only_here(source)]
        if norms:
            node.kind, node.name = "adaln", node.name.replace(".add_", ".adaln_")
            node.sources.remove(norms[0])
            node.sources = [*norms[0].sources, *(each for each in node.sources if each not in norms[0].sources)]
            gone.add(norms[0])
    return [node for node in nodes if node not in gone]
