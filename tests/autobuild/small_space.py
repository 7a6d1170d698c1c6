"""A search space small enough to go through whole: two blocks of an attention and a feed-forward, and a first layer."""

import numpy as np

from autobuild.graph import WEIGHT, DenoiserGraph, Node
from autobuild.space import SearchSpace

FAMILY = "pixart_alpha"  # for the weights' precision


def small_graph():
    nodes = []

    def add(kind, path, *sources):
        name = f"model.{path}.weight_quantizer" if kind == WEIGHT else f"model.{path}.{kind}_{len(nodes)}"
        nodes.append(Node(name, kind, path, list(sources)))
        return nodes[-1]

    last = add(WEIGHT, "proj")
    for number in range(2):
        block = f"transformer_blocks.{number}"
        query, key, value = (add(WEIGHT, f"{block}.attn1.to_{each}", last) for each in "qkv")
        scores = add("matmul", f"{block}.attn1", query, key)
        out = add(WEIGHT, f"{block}.attn1.to_out.0", add("matmul", f"{block}.attn1", scores, value))
        last = add("add", block, last, out)
        inner = add(WEIGHT, f"{block}.ff.net.0.proj", last)
        last = add("add", block, last, add(WEIGHT, f"{block}.ff.net.2", inner))
    return DenoiserGraph(nodes)


def small_space(seed=0):
    """Every method has a size and an error of its own; more bits are more bytes and less error."""
    rng = np.random.default_rng(seed)
    graph = small_graph()
    count = len(graph.weights)
    keys = [[node.name] for node in graph.weights]
    fp_bytes = rng.integers(50, 200, count) * 16.0
    sizes = fp_bytes[:, None] / 16 * np.array([4.5, 3.5, 6.0, 4.4, 4.1, 3.1])
    errors = rng.uniform(0.5, 2.0, (count, 1)) * np.array([1.0, 3.0, 0.5, 2.0, 1.5, 4.0]) * rng.uniform(0.8, 1.2, (count, 6))
    return SearchSpace(FAMILY, graph, keys, fp_bytes, sizes.round(), errors)


def random_codes(space, count, seed=0):
    return np.random.default_rng(seed).integers(6, size=(count, len(space.keys)))
