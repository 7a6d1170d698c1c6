"""A denoiser's graph as a picture, layer by layer from input to output (Sugiyama et al., 1981, by igraph).

A weight is a box in the colour of its method, dark for 4 bits and light for 3; an operation is grey. A node that very
many others read, such as the time embedding, would cover the picture with its edges: its readers carry its name instead.
"""

import io
import itertools
from pathlib import Path

import igraph
import matplotlib
from PIL import Image

from autobuild.graph import DenoiserGraph
from quant.files import atomic_write
from quant.registry import quantizer

COLORS = {"mse": ("#1d4ed8", "#93c5fd"), "kmeans": ("#b45309", "#fcd34d"), "kmeans_all": ("#047857", "#6ee7b7")}
NO_METHOD, OPERATION, EDGE, SHADE = "#334155", "#d4d4d8", "#71717a", "#f4f4f5"
HUB_READERS = 9  # from here on a node's readers carry its name
WIDTH, HEIGHT, GAP = 2.5, 0.5, 0.35  # inches: of a box, and from box to box
MOST_INCHES = 1300  # of a side: matplotlib draws 65,536 dots at most


def draw(graph, path, configuration=None, block=None, dpi=50):
    """Write the picture of a graph, or of one block of it, to a .png or .svg file.

    `configuration` {key: method} colours the weights.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    nodes = [node for node in graph.nodes if block is None or node.block == block]
    shown = DenoiserGraph(nodes)
    hubs = hubs_of(graph) if block is None else set()
    edges = [
        (shown.number[source.name], number)
        for number, node in enumerate(nodes)
        for source in node.sources
        if source.name in shown.number and source not in hubs
    ]
    places, routes = layout(len(nodes), edges)
    left, right = min(x for x, _ in places), max(x for x, _ in places)
    lowest = max(y for _, y in places)
    size = ((right - left + 1) * (WIDTH + GAP) + 1, (lowest + 1) * (HEIGHT + GAP) + 1)
    figure = pyplot.figure(figsize=[min(each, MOST_INCHES) for each in size], dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left - 0.6, right + 0.6), ylim=(lowest + 0.8, -0.8))
    axes.axis("off")
    shade_blocks(axes, nodes, places, (left - 0.6, right + 0.6))
    for (source, target), route in zip(edges, routes, strict=True):
        draw_edge(axes, [places[source], *route, places[target]])
    for node, place in zip(nodes, places, strict=True):
        absent = [source for source in node.sources if source in hubs or source.name not in shown.number]
        draw_node(axes, node, place, color_of(node, configuration), absent)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:])
    pyplot.close(figure)
    with atomic_write(path) as file:
        file.write(picture.getvalue() if Path(path).suffix == ".svg" else few_colors(picture))


def few_colors(picture):
    """The bytes of a PNG picture with as many colours as a drawing needs: a quarter of the size."""
    small, most = io.BytesIO(), Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # ours are large
    try:
        Image.open(picture).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    finally:
        Image.MAX_IMAGE_PIXELS = most  # what guards against files of others
    return small.getvalue()


def hubs_of(graph):
    """The nodes that very many others read."""
    readers = dict.fromkeys(graph.nodes, 0)
    for node in graph.nodes:
        for source in node.sources:
            readers[source] += 1
    return {node for node, count in readers.items() if count >= HUB_READERS}


def layout(count, edges):
    """Places [(x, y)] of nodes, and the points between its ends that each edge passes; `edges` in topological order.

    Parts that no edge connects stand side by side: igraph, given several at once, mixes up their edges.
    """
    places, routes, right = [None] * count, [None] * len(edges), 0.0
    for part in sorted(igraph.Graph(n=count, edges=edges).connected_components(), key=len, reverse=True):
        number = {node: place for place, node in enumerate(part)}
        inside = [place for place, (source, _) in enumerate(edges) if source in number]
        own = [(number[source], number[target]) for source, target in (edges[place] for place in inside)]
        laid = igraph.Graph(n=len(part), edges=own, directed=True).layout_sugiyama(
            layers=late_layers(len(part), own), maxiter=200
        )
        left = right - min([x for x, _ in laid.coords])
        for node, (x, y) in zip(part, laid.coords, strict=True):
            places[node] = (x + left, y)
        for place, route in zip(inside, laid.edge_routing, strict=True):
            routes[place] = [(x + left, y) for x, y in route]
        right = 1 + max(x for x, _ in [*(places[node] for node in part), *(p for i in inside for p in routes[i])])
    return apart(places), routes


def apart(places):
    """The places, those that overlap moved to the right: igraph lays some nodes half a width apart."""
    free, moved = {}, list(places)
    for node in sorted(range(len(places)), key=lambda node: places[node]):
        x, y = places[node]
        moved[node] = (max(x, free.get(y, x)), y)
        free[y] = moved[node][0] + 1
    return moved


def late_layers(count, edges):
    """A layer for each node, as late as the nodes that read it allow."""
    layers = [0] * count
    for source, target in edges:
        layers[target] = max(layers[target], layers[source] + 1)
    latest = {}
    for source, target in reversed(edges):
        layers[target] = latest.get(target, layers[target])
        latest[source] = min(latest.get(source, count), layers[target] - 1)
    return [latest.get(node, layer) for node, layer in enumerate(layers)]


def color_of(node, configuration):
    if not node.is_weight:
        return OPERATION
    if configuration is None:
        return NO_METHOD
    method = quantizer(configuration[node.name])
    return COLORS[method.algorithm][method.bits <= 3]


def draw_node(axes, node, place, color, absent):
    x, y = place
    width, height = WIDTH / (WIDTH + GAP), HEIGHT / (HEIGHT + GAP)
    box = matplotlib.patches.FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=color,
        edgecolor="none",
        zorder=3,
    )
    axes.add_patch(box)
    dark = sum(matplotlib.colors.to_rgb(color)) < 1.6
    size = min(13, 13 * 21 / max(len(node.layer_type), 1))
    ink = {"color": "white" if dark else "#18181b", "ha": "center", "va": "center", "zorder": 4}
    axes.text(x, y - (height / 5 if absent else 0), node.layer_type, fontsize=size, **ink)
    if absent:
        names = ", ".join(source.path if source.is_weight else source.name.removeprefix("model.") for source in absent)
        axes.text(x, y + height / 4, f"from {names}", fontsize=min(8, 8 * 46 / len(names)), **ink)


def draw_edge(axes, points):
    """A smooth line through the points, an arrow at its end."""
    height = HEIGHT / (HEIGHT + GAP) / 2
    (x0, y0), (x1, y1) = points[0], points[-1]
    points = [(x0, y0 + height), *points[1:-1], (x1, y1 - height)]
    vertices, codes = [points[0]], [matplotlib.path.Path.MOVETO]
    for (ax, ay), (bx, by) in itertools.pairwise(points):
        vertices += [(ax, (ay + by) / 2), (bx, (ay + by) / 2), (bx, by)]
        codes += [matplotlib.path.Path.CURVE4] * 3
    line = matplotlib.patches.FancyArrowPatch(
        path=matplotlib.path.Path(vertices, codes), arrowstyle="-|>", mutation_scale=8, color=EDGE, linewidth=1, zorder=2
    )
    axes.add_patch(line)


def shade_blocks(axes, nodes, places, across):
    """A band behind each block, with its name."""
    rows = {}
    for node, (_, y) in zip(nodes, places, strict=True):
        if node.block:
            rows.setdefault(node.block, []).append(y)
    for number, (block, ys) in enumerate(rows.items()):
        top, bottom = min(ys) - 0.5, max(ys) + 0.5
        if number % 2 == 0:
            axes.axhspan(top, bottom, color=SHADE, zorder=0)
        axes.text(across[0] + 0.05, top + 0.1, block, ha="left", va="top", color="#52525b", fontsize=12, zorder=1)
