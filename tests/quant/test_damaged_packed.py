"""Truncated, mutated and foreign folders of packed models: one line that names what is wrong, and nothing is loaded."""

import copy
import json
import random
import struct

import pytest
import torch
from diffusers import AutoModel, FluxTransformer2DModel
from packed_models import change_tensors, packed, predict
from safetensors.torch import load_file

from errors import InputError
from quant import Qua2SeDiMoConfig, pretrained

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
LAYER = "transformer_blocks.0.attn1.to_q"
FUZZED = 300


@pytest.fixture(params=["pixart", "tiny_dit", pytest.param("tiny_sdxl", marks=pytest.mark.slow)])
def name(request):
    return request.param


def saved(name, folder):
    denoiser, arguments, output = packed(name)
    denoiser.save_pretrained(folder)
    return arguments, output


def signed(told):
    """A configuration with the digest of what it says, where it has one."""
    if isinstance(told, dict) and "digest" in told:
        told = {name: value for name, value in told.items() if name != "digest"}
        told["digest"] = pretrained._digest_of(told)
    return told


def change_told(folder, change):
    """Let `change` alter the quantization configuration of the folder's `config.json`."""
    told = json.loads((folder / CONFIG).read_text())
    told["quantization_config"] = signed(change(told["quantization_config"]) or told["quantization_config"])
    (folder / CONFIG).write_text(json.dumps(told))


def refused(folder, words):
    with pytest.raises(InputError, match=words) as told:
        AutoModel.from_pretrained(str(folder))
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def set_to(key, value):
    return lambda told: told.__setitem__(key, value)


FIRST = "pos_embed.proj"
TOLD = {
    "version": (set_to("version", 3), "version 3"),
    "version of another kind": (set_to("version", [1]), "version"),
    "no weights": (set_to("weights", None), "names no weights"),
    "weights a list": (set_to("weights", ["a"]), "weights is"),
    "weights a number": (set_to("weights", 4), "weights is"),
    "method a number": (lambda told: told["weights"].__setitem__(FIRST, 4), f"{FIRST} has 4"),
    "method nested": (lambda told: told["weights"].__setitem__(FIRST, [[["mse-4"], 4]]), FIRST),
    "method in a dictionary": (lambda told: told["weights"].__setitem__(FIRST, {"a": []}), FIRST),
    "no split": (lambda told: told["weights"].__setitem__(FIRST, []), FIRST),
    "split that does not add up": (
        lambda told: told["weights"].__setitem__(FIRST, [["mse-4", 1], ["mse-4", 2]]),
        rf"{FIRST} is split into \[1, 2\] of its 4",
    ),
    "split of a width below 1": (lambda told: told["weights"].__setitem__(FIRST, [["mse-4", 5], ["mse-4", -1]]), FIRST),
    "split of a true width": (lambda told: told["weights"].__setitem__(FIRST, [["mse-4", True]]), FIRST),
    "no such module": (lambda told: told["weights"].__setitem__("blocks.7.to_q", "mse-4"), "blocks.7.to_q' is not in a"),
    "module without a weight": (
        lambda told: told["weights"].__setitem__("transformer_blocks.0", "mse-4"),
        "not to be packed",
    ),
    "empty module": (lambda told: told["weights"].__setitem__("", "mse-4"), "not to be packed"),
    "weight left out": (lambda told: told["weights"].pop(LAYER) and None, f"lack 1 tensors, first {LAYER}.weight"),
    "ties a list": (set_to("ties", [LAYER]), "ties is"),
    "tie to nothing": (set_to("ties", {LAYER: "elsewhere"}), f"{LAYER} cannot share the weights of 'elsewhere'"),
    "tie of nothing": (set_to("ties", {"elsewhere": LAYER}), "elsewhere cannot share"),
    "tie to a number": (set_to("ties", {LAYER: 3}), "cannot share"),
    "tie to itself": (set_to("ties", {LAYER: LAYER}), "cannot share"),
    "ties in a ring": (set_to("ties", {LAYER: FIRST, FIRST: LAYER}), "cannot share"),
    "tie to another kind": (set_to("ties", {LAYER: FIRST}), "another kind"),
    "modules_to_not_convert a number": (set_to("modules_to_not_convert", 3), "modules_to_not_convert"),
}


@pytest.mark.parametrize(("change", "words"), TOLD.values(), ids=TOLD)
def test_a_configuration_that_does_not_fit(change, words, tmp_path):
    saved("pixart", tmp_path)
    change_told(tmp_path, change)
    refused(tmp_path, words)


def test_a_method_that_is_unknown(tmp_path):
    saved("pixart", tmp_path)
    change_told(tmp_path, lambda told: told["weights"].__setitem__(LAYER, "mse-9000"))
    refused(tmp_path, "mse-9000")


@pytest.mark.parametrize("told", [{"quant_method": "other"}, {"quant_method": None}, {}, [], 3, "qua2sedimo"], ids=repr)
def test_a_quantization_that_is_not_ours_is_refused_by_diffusers(told, tmp_path):
    saved("pixart", tmp_path)
    change_told(tmp_path, lambda _: told or {"a": 1})
    with pytest.raises((ValueError, AttributeError, TypeError)):
        AutoModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["pixart", "tiny_dit"])
def test_a_quantization_that_is_not_told_at_all(name, options, tmp_path):
    """diffusers then asks no quantizer, warns, and goes on with weights that hold nothing."""
    for in_shards, told in ((False, None), (True, "absent")):
        packed(name)[0].save_pretrained(tmp_path / str(in_shards), max_shard_size=4000 if in_shards else "1GB")
        path = tmp_path / str(in_shards) / CONFIG
        settings = json.loads(path.read_text()) | {"quantization_config": told}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value != "absent"}))
        with pytest.raises(InputError, match=r"weights are packed, and its config\.json does not say so"):
            AutoModel.from_pretrained(str(path.parent), **options)


def test_a_single_file_is_refused(tmp_path):
    """diffusers makes of it names of its own, or asks no quantizer."""
    saved("flux", tmp_path)
    for options in ({}, {"low_cpu_mem_usage": False}, {"quantization_config": Qua2SeDiMoConfig("mse-4")}):
        with pytest.raises(InputError, match=f"{WEIGHTS}: its weights are packed"):
            FluxTransformer2DModel.from_single_file(str(tmp_path / WEIGHTS), config=str(tmp_path), **options)


def test_a_configuration_of_another_model(tmp_path):
    saved("pixart", tmp_path / "one")
    saved("flux", tmp_path / "other")
    (tmp_path / "one" / CONFIG).write_bytes((tmp_path / "other" / CONFIG).read_bytes())
    refused(tmp_path / "one", "lack")


def test_other_methods_than_the_tensors_are_of(name, tmp_path):
    """Every weight under every other word: told by a tensor's shape, or by one that is too much or lacks."""
    denoiser, _, _ = packed(name)
    denoiser.save_pretrained(tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text())
    path = next(path for path, method in told["quantization_config"]["weights"].items() if isinstance(method, str))
    method = told["quantization_config"]["weights"][path]
    for other in {"mse-4", "mse-3", "kmeans-4", "kmeans-3", "kmeans_all-4", "kmeans_all-3"} - {method}:
        changed = copy.deepcopy(told)
        changed["quantization_config"]["weights"][path] = other
        changed["quantization_config"] = signed(changed["quantization_config"])
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        refused(tmp_path, path)


def put(tensor_name, change):
    return lambda tensors: tensors.__setitem__(tensor_name, change(tensors[tensor_name]))


def _with_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def method_at(denoiser, algorithm):
    """The first packed layer whose method is of an algorithm."""
    return next(p for p, layer in denoiser.named_modules() if hasattr(layer, "codes") and _is(layer, algorithm))


def _is(layer, algorithm):
    return layer.parts[0].method.startswith(algorithm + "-")


TENSORS = {
    "lost codes": lambda path: (lambda tensors: tensors.pop(f"{path}.codes"), f"lack 1 tensors, first {path}.codes"),
    "lost table": lambda path: (lambda tensors: tensors.pop(f"{path}.table"), f"first {path}.table"),
    "lost bias": lambda path: (lambda tensors: tensors.pop(f"{path}.bias"), f"first {path}.bias"),
    "one too many": lambda path: (
        lambda tensors: tensors.__setitem__(f"{path}.weight", torch.ones(2)),
        f"1 tensors too many, first {path}.weight",
    ),
    "narrow codes": lambda path: (put(f"{path}.codes", lambda t: t[:, :-1].contiguous()), f"{path}.codes"),
    "wide codes": lambda path: (put(f"{path}.codes", lambda t: torch.cat([t, t], 1)), f"{path}.codes"),
    "flat codes": lambda path: (put(f"{path}.codes", torch.flatten), f"{path}.codes"),
    "signed codes": lambda path: (put(f"{path}.codes", lambda t: t.view(torch.int8)), f"{path}.codes"),
    "float codes": lambda path: (put(f"{path}.codes", torch.Tensor.float), f"{path}.codes"),
    "short table": lambda path: (put(f"{path}.table", lambda t: t[:-1].contiguous()), f"{path}.table"),
    "whole table": lambda path: (put(f"{path}.table", torch.Tensor.int), f"{path}.table"),
    "float8 table": lambda path: (put(f"{path}.table", lambda t: t.to(torch.float8_e4m3fn)), f"{path}.table"),
    "complex table": lambda path: (put(f"{path}.table", lambda t: t.to(torch.complex64)), f"{path}.table"),
    "nan": lambda path: (put(f"{path}.table", _with_first(torch.nan)), f"{path}: its"),
    "infinite": lambda path: (put(f"{path}.table", _with_first(torch.inf)), f"{path}: its"),
}


@pytest.mark.parametrize("algorithm", ["mse", "kmeans", "kmeans_all"])
@pytest.mark.parametrize("damage", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(damage, algorithm, tmp_path):
    saved("pixart", tmp_path)
    path = method_at(packed("pixart")[0], algorithm)
    change, words = damage(path)
    change_tensors(tmp_path / WEIGHTS, change)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("algorithm", "leaf", "change", "words"),
    [
        ("mse", "table", torch.neg, "table is damaged"),
        ("mse", "table", torch.zeros_like, "table is damaged"),
        ("mse", "zero", torch.Tensor.float, "zero"),
        ("mse", "zero", lambda t: t.view(torch.uint8), "zero"),
        ("mse", "zero", lambda t: t[:-1].contiguous(), "zero"),
        ("kmeans", "table", lambda t: t.flip(1).contiguous(), "table is damaged"),
        ("kmeans_all", "table", lambda t: t.flip(0).contiguous(), "table is damaged"),
    ],
)
def test_tables_that_no_fit_makes(algorithm, leaf, change, words, tmp_path):
    saved("pixart", tmp_path)
    path = method_at(packed("pixart")[0], algorithm)
    change_tensors(tmp_path / WEIGHTS, put(f"{path}.{leaf}", change))
    refused(tmp_path, words)


def test_tied_tensors_that_are_in_the_file_after_all(tmp_path):
    """They might differ from those that they are told to be."""
    saved("tiny_dit", tmp_path)
    ties = json.loads((tmp_path / CONFIG).read_text())["quantization_config"]["ties"]
    path, shared = next(iter(ties.items()))
    change_tensors(tmp_path / WEIGHTS, lambda tensors: tensors.__setitem__(f"{path}.codes", tensors[f"{shared}.codes"] + 1))
    refused(tmp_path, f"too many, first {path}.codes")


def test_ties_that_are_not_told(tmp_path):
    saved("tiny_dit", tmp_path)
    change_told(tmp_path, lambda told: told.pop("ties") and None)
    refused(tmp_path, "lack")


def in_shards(folder):
    packed("pixart")[0].save_pretrained(folder, max_shard_size=4000)
    return sorted(folder.glob("*-of-*.safetensors"))


def test_a_shard_that_is_missing_is_told_by_diffusers(tmp_path):
    shard = in_shards(tmp_path)[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModel.from_pretrained(str(tmp_path))


def test_a_shard_that_has_not_what_the_index_promises(tmp_path):
    shard = in_shards(tmp_path)[1]
    lost = next(key for key in load_file(shard) if key.endswith(".codes"))
    change_tensors(shard, lambda tensors: tensors.pop(lost))
    refused(tmp_path, lost.removesuffix(".codes"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_file_that_is_cut_short_is_told_by_diffusers(share, tmp_path):
    saved("pixart", tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(OSError, match=WEIGHTS):
        AutoModel.from_pretrained(str(tmp_path))


GARBAGE = [
    None,
    True,
    -1,
    0,
    3,
    2.5,
    "",
    "mse-4",
    "kmeans-3",
    "x.y",
    [],
    ["mse-4"],
    [["mse-4", 8]],
    {},
    {"a": {"b": [1]}},
    "💥",
]


def mutated(value, draw):
    """A copy of a JSON value with something in it replaced, left out, renamed or put elsewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        value = dict(value)
        key = draw.choice(list(value))
        how = draw.randrange(5)
        if how == 0:
            del value[key]
        elif how == 1:
            value[f"{key}{draw.choice('x.0')}"] = value.pop(key)
        elif how == 2:
            other = draw.choice(list(value))
            value[key], value[other] = value[other], value[key]
        else:
            value[key] = mutated(value[key], draw)
        return value
    return draw.choice(GARBAGE)


def loads_or_is_refused(folder, arguments, output):
    """Whether the folder loads, to exactly what it should; else it was refused in a line."""
    try:
        loaded = AutoModel.from_pretrained(str(folder))
    except (InputError, OSError, ValueError, AttributeError, TypeError, KeyError) as reason:
        if isinstance(reason, InputError):
            assert "\n" not in str(reason)
        return False
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(predict(loaded, arguments), output)
    return True


def test_mutated_configurations_are_refused_or_load_the_same(name, tmp_path):
    """What is mutated is ours: of the rest, some is read by no one and some means another model of the same shapes."""
    arguments, output = saved(name, tmp_path)
    content, draw, loaded = json.loads((tmp_path / CONFIG).read_text()), random.Random(0), 0
    for _ in range(FUZZED // 3):
        changed = content | {"quantization_config": mutated(content["quantization_config"], draw)}
        if changed["quantization_config"] is None:
            continue  # diffusers asks nothing of ours then: it warns, and gives a model on the meta device
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        loaded += loads_or_is_refused(tmp_path, arguments, output)
    assert 0 < loaded < FUZZED // 6  # notes that no one reads may be anything


def test_mutated_headers_are_refused_or_load_the_same(name, tmp_path):
    """But for names and precisions of equal width that are exchanged, which digests have to tell."""
    arguments, output = saved(name, tmp_path)
    content, draw = (tmp_path / WEIGHTS).read_bytes(), random.Random(1)
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(FUZZED // 3):
        changed = copy.deepcopy(header)
        key = draw.choice([key for key in changed if key != "__metadata__"])
        entry = changed[key]
        how = draw.randrange(5)
        if how == 0:
            del changed[key]
        elif how == 1:
            changed[f"{key}x"] = changed.pop(key)
        elif how == 2:
            entry["shape"] = draw.choice([[*entry["shape"], 1], entry["shape"][1:], [0], [-1], "shape", [2**62, 2**62]])
            if entry["shape"] == header[key]["shape"]:
                continue
        elif how == 3:
            entry["dtype"] = draw.choice([d for d in ("I64", "I8", "BOOL", "F64", "U64", "X", 3) if d != entry["dtype"]])
        else:
            first, last = entry["data_offsets"]
            entry["data_offsets"] = draw.choice(
                [[first + 1, last], [first, last - 1], [first - 1, last - 1], [last, first], [0]]
            )
        text = json.dumps(changed).encode()
        (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + rest)
        assert not loads_or_is_refused(tmp_path, arguments, output), (how, key, entry)
