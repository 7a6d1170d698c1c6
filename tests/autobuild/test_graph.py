"""The denoisers' graphs, traced at real size without weights."""

import pytest
from PIL import Image
from zoo import ZOO, denoisers

from autobuild import draw, graph
from autobuild.graph import of_family
from models.families import FAMILIES
from quant import config
from quant.file_keys import by_file_key, file_key
from quant.slots import find_slots, free_keys
from stages import plot_dag
from stages.run import run_main


def named(traced, name):
    """The nodes of a name without `model.` and `.weight_quantizer`."""
    return next(node for node in traced.nodes if node.name in (f"model.{name}", f"model.{name}.weight_quantizer"))


def sources(traced, name):
    return {each.name.removeprefix("model.").removesuffix(".weight_quantizer") for each in named(traced, name).sources}


@pytest.mark.parametrize(
    "name", [name if name in ("pixart_alpha", "dit") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_weight_once_and_edges_forward(name):
    traced = of_family(name)
    _, slots = graph.slots_of_family(name)
    assert sorted(node.name for node in traced.weights) == sorted(slots[key].file_key for key in free_keys(slots))
    assert all(source < node for source, node in traced.edges)
    read = {source for source, _ in traced.edges}
    assert [node.name for number, node in enumerate(traced.nodes) if number not in read] == [traced.nodes[-1].name]
    for node in traced.nodes:
        assert node.is_weight or len(node.sources) > 1 or node.kind == "norm", node.name


def test_pixart_block():
    """Written down from the model's forward pass."""
    block = "transformer_blocks.3"
    expected = {
        f"{block}.adaln_0": {"transformer_blocks.2.add_4", "adaln_single.linear"},
        f"{block}.attn1.to_v": {f"{block}.adaln_0"},
        f"{block}.attn1.matmul_0": {f"{block}.attn1.to_q", f"{block}.attn1.to_k"},
        f"{block}.attn1.matmul_1": {f"{block}.attn1.matmul_0", f"{block}.attn1.to_v"},
        f"{block}.attn1.to_out.0": {f"{block}.attn1.matmul_1"},
        f"{block}.add_1": {"transformer_blocks.2.add_4", "adaln_single.linear", f"{block}.attn1.to_out.0"},  # gated
        f"{block}.attn2.to_q": {f"{block}.add_1"},
        f"{block}.attn2.to_k": {"caption_projection.linear_2"},
        f"{block}.add_2": {f"{block}.add_1", f"{block}.attn2.to_out.0"},
        f"{block}.adaln_3": {f"{block}.add_2", "adaln_single.linear"},
        f"{block}.ff.net.2": {f"{block}.ff.net.0.proj"},
        f"{block}.add_4": {f"{block}.add_2", "adaln_single.linear", f"{block}.ff.net.2"},
    }
    traced = of_family("pixart_alpha")
    assert {name: sources(traced, name) for name in expected} == expected
    assert sources(traced, "proj_out") == {"adaln_0"}
    assert {node.block for node in traced.nodes if node.name.startswith(f"model.{block}.")} == {block}
    assert named(traced, f"{block}.ff.net.0.proj").layer_type == "ff.net.0.proj"


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        # As many as the published graph has, and
        ("dit", 369 + 1),  # the output's modulation
        ("pixart_alpha", 568 - 28),  # less a norm in each block's cross-attention, which the model does not have
        # norms; joins of skips; sums with the time embedding; residual sums around transformers and around resnets
        # that keep their width
        ("sdv15", 432 + 109 + 12 + 22 + 16 + 8),
        # norms, joins of skips, sums with the time embedding and of a split weight's halves, residual sums of attentions
        # and of resnets that keep their width; less a node for the input of each resnet that does not
        pytest.param("sdxl", 1316 + 256 + 9 + 17 + 9 + 11 + 6 - 11, marks=pytest.mark.slow),
        # the last block; norms of queries, keys and joined skips, these joins, modulations
        pytest.param("hunyuan", 844 + 23 + 80 + 80 + 19 + 19 + 41, marks=pytest.mark.slow),
    ],
)
def test_what_differs_from_the_published_graphs(name, nodes):
    assert len(of_family(name).nodes) == nodes


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_weight_is_in_one_unit(name):
    traced = of_family(name)
    units = traced.units()
    assert sorted(node.name for unit in units for node in unit.weights) == sorted(node.name for node in traced.weights)
    assert all(len(unit.weights) <= 4 and unit.hops <= 5 for unit in units)


def test_units_of_a_block():
    found = {
        unit.root.layer_type: ([node.layer_type for node in unit.nodes], unit.hops)
        for unit in of_family("pixart_alpha").units()
        if unit.root.block == "transformer_blocks.5"
    }
    assert found == {
        "attn1.to_out.0": (["attn1.to_q", "attn1.to_k", "attn1.to_v", "matmul", "matmul", "attn1.to_out.0"], 3),
        "attn2.to_out.0": (["attn2.to_q", "attn2.to_k", "attn2.to_v", "matmul", "matmul", "attn2.to_out.0"], 3),
        "ff.net.2": (["ff.net.0.proj", "ff.net.2"], 1),
    }
    hunyuan = {
        unit.root.layer_type: len(unit.weights) for unit in of_family("hunyuan").units() if unit.root.block == "blocks.39"
    }
    assert hunyuan == {
        "norm1.linear": 1,
        "skip_linear": 1,
        "skip_linear (skip)": 1,
        "attn1.to_out.0": 4,
        "attn2.to_out.0": 4,
        "ff.net.2": 2,
    }


def test_ties_splits_and_skips():
    dit = of_family("dit")
    tied = named(dit, "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2")
    assert sum(tied in node.sources for node in dit.nodes) == 29 and tied.block == ""  # 28 blocks and the output
    assert sources(dit, "proj_out_2") == {"adaln_0"}
    assert sources(dit, "adaln_0") == {"transformer_blocks.27.add_2", "proj_out_1"}

    hunyuan = of_family("hunyuan")
    assert sources(hunyuan, "blocks.39.concat_0") == {"blocks.38.add_2", "blocks.0.add_2"}
    parts = {"blocks.39.skip_linear", "blocks.39.skip_linear.weight_quantizer_0"}
    assert sources(hunyuan, "blocks.39.skip_linear.add_0") == parts
    assert hunyuan.counts()["concat"] == 19 and not any("pooler" in node.name for node in hunyuan.nodes)

    unet = of_family("sdxl")
    assert unet.counts()["concat"] == 9
    skip = {"mid_block.resnets.1.add_1", "down_blocks.2.attentions.1.add_0"}
    assert sources(unet, "up_blocks.0.concat_0") == skip
    assert named(unet, "mid_block.attentions.0.transformer_blocks.2.attn1.to_q").block == (
        "mid_block.attentions.0.transformer_blocks.2"
    )


@pytest.mark.parametrize(
    ("name", "combining"),
    [
        # Three joint blocks. Two have two attentions, whose inputs are modulations of one norm, which so stays a norm:
        # 1 of the image and 2 of the text are left in each; the last has 2 and 1, the output one. Five attentions.
        ("sd3", (10, 10)),
        # Two double, two single blocks: 2 x 4 + 2 modulations, the output's; four attentions.
        ("flux", (11, 8)),
    ],
)
def test_other_denoisers_come_through_the_same_code(name, combining):
    denoiser = denoisers.build(name).to("meta")
    slots = find_slots(denoiser)
    traced = graph.trace(denoiser, ZOO[name].inputs(denoiser), slots)
    read = {source for source, _ in traced.edges}
    assert {node.name for node in traced.weights} == {slot.file_key for slot in slots.values()}
    assert (traced.counts()["adaln"], traced.counts()["matmul"]) == combining
    assert [node.name for number, node in enumerate(traced.nodes) if number not in read] == [file_key("proj_out")]


def test_a_picture_of_a_block(tmp_path, monkeypatch, capsys):
    output = tmp_path / "block.png"
    flags = ["--family", "pixart_alpha", "--block", "transformer_blocks.0", "--q_config", "uniform:kmeans-3"]
    monkeypatch.setattr("sys.argv", ["plot_dag.py", *flags, "--output", str(output)])
    run_main(plot_dag.main)
    assert "540 nodes (287 weight" in capsys.readouterr().out
    picture = Image.open(output).convert("RGB")
    colors = {color for _, color in picture.getcolors(1 << 24)}
    wanted = tuple(int(draw.COLORS["kmeans"][1][place : place + 2], 16) for place in (1, 3, 5))
    assert min(sum(abs(a - b) for a, b in zip(color, wanted, strict=True)) for color in colors) < 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--family", "dit", "--block", "blocks.0"], "--block blocks.0: dit has transformer_blocks.0"),
        (["--family", "dit", "--output", "x.pdf"], "must end in .png or .svg"),
        (["--family", "dit", "--q_config", "nowhere.pkl"], "nowhere.pkl: no such file"),
    ],
)
def test_bad_flags(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plot_dag.py", *flags])
    with pytest.raises(SystemExit):
        run_main(plot_dag.main)
    assert message in capsys.readouterr().err


def test_layout_keeps_order_and_nothing_overlaps():
    traced = of_family("sdv15")
    places, routes = draw.layout(len(traced.nodes), traced.edges)
    for (source, target), route in zip(traced.edges, routes, strict=True):
        heights = [y for _, y in (places[source], *route, places[target])]
        assert heights == sorted(heights) and len(set(heights)) == len(heights)
    rows = {}
    for x, y in places:
        rows.setdefault(y, []).append(x)
    assert all(b - a >= 1 for xs in rows.values() for a, b in zip(sorted(xs), sorted(xs)[1:], strict=False))


def test_configurations_colour_all_weights():
    _, slots = graph.slots_of_family("dit")
    configuration = by_file_key(config.draw_random(slots, 1, 0), slots)
    assert len({draw.color_of(node, configuration) for node in of_family("dit").weights}) == 6
