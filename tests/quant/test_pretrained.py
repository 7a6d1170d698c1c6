"""Packed denoisers are saved and loaded by diffusers as any model of its own."""

import json
import subprocess
import sys
import weakref

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, PipelineQuantizationConfig
from hub_layouts.hub import hub_cache, use_cache
from packed_models import NAMES, OTHERS, build, inputs, packed, predict
from safetensors import safe_open
from zoo import ZOO

from errors import InputError
from quant import Qua2SeDiMoConfig, QuantizedModel
from quant.layers import packed_layers

EACH = pytest.mark.parametrize("name", NAMES)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tensors_of(folder):
    """{name: tensor} of all safetensors files in a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def configuration_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@EACH
def test_it_computes_the_same_when_loaded(name, tmp_path):
    denoiser, arguments, output = packed(name)
    denoiser.save_pretrained(tmp_path)
    for loaded in (AutoModel.from_pretrained(str(tmp_path)), type(denoiser).from_pretrained(tmp_path)):
        assert type(loaded) is type(denoiser)
        assert torch.equal(predict(loaded, arguments), output)
        assert [path for path, _ in packed_layers(loaded)] == [path for path, _ in packed_layers(denoiser)]


@EACH
def test_files_are_the_same_when_saved_again_whole_or_in_shards(name, tmp_path):
    denoiser, arguments, output = packed(name)
    for folder, size in (("first", "10GB"), ("second", "10GB"), ("shards", 4000)):
        denoiser.save_pretrained(tmp_path / folder, max_shard_size=size)
    loaded = AutoModel.from_pretrained(str(tmp_path / "shards"))
    loaded.save_pretrained(tmp_path / "third")
    first, *others = (tmp_path / folder / WEIGHTS for folder in ("first", "second", "third"))
    assert all(other.read_bytes() == first.read_bytes() for other in others)
    assert configuration_of(tmp_path / "third") == configuration_of(tmp_path / "first")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(predict(loaded, arguments), output)


@EACH
def test_a_folder_holds_codes_once_and_tells_how_it_was_made(name, tmp_path):
    denoiser, _, _ = packed(name)
    denoiser.save_pretrained(tmp_path)
    told, tensors, layers = configuration_of(tmp_path), tensors_of(tmp_path), dict(packed_layers(denoiser))
    assert (told["quant_method"], told["version"]) == ("qua2sedimo", 2)
    assert told["weights"].keys() == layers.keys()
    assert told["precision_bits"] == (16 if name.startswith("tiny_") and name != "tiny_sdv15" else 32)
    assert 3 < told["avg_bits"] < 32
    ties = told.get("ties", {})
    assert bool(ties) == (name == "tiny_dit")
    for path in layers:
        assert f"{path}.weight" not in tensors
        assert (f"{path}.codes" in tensors) != (path in ties)
    split = [path for path, methods in told["weights"].items() if not isinstance(methods, str)]
    assert bool(split) == (name in ("tiny_hunyuan", "tiny_sdxl", "tiny_sdv15"))
    assert all(f"{path}.codes_1" in tensors for path in split)


def test_ties_are_one_tensor_when_loaded(tmp_path):
    denoiser, _, _ = packed("tiny_dit")
    denoiser.save_pretrained(tmp_path)
    first, second = (block.norm1.emb for block in AutoModel.from_pretrained(str(tmp_path)).transformer_blocks)
    for name in ("codes", "table"):
        one, other = (getattr(emb.timestep_embedder.linear_1, name) for emb in (first, second))
        assert one is other


# In a process of its own, which imports nothing of ours but `quant`.
FRESH = """
import sys, torch
import quant
from diffusers import AutoModel
denoiser = AutoModel.from_pretrained(sys.argv[1])
arguments = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(denoiser(**arguments, return_dict=False)[0], sys.argv[3])
"""


def test_a_fresh_process_needs_to_import_quant_alone(tmp_path):
    denoiser, arguments, output = packed("pixart")
    denoiser.save_pretrained(tmp_path / "saved")
    torch.save(arguments, tmp_path / "arguments")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *(tmp_path / name for name in ("saved", "arguments", "output"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "output").flatten(), output)


@pytest.mark.parametrize("name", ZOO)
def test_pipelines_draw_the_same_when_loaded(name, tmp_path):
    entry = ZOO[name]
    pipeline = entry.build_pipeline()
    for attribute, method in zip(entry.denoiser_names, ("mse-4", "kmeans-3"), strict=False):
        QuantizedModel(getattr(pipeline, attribute)).pack(method, show=False)
    drawn = entry.draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert all(getattr(loaded, attribute).is_quantized for attribute in entry.denoiser_names)
    assert np.array_equal(entry.draw(loaded), drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH
def test_loaded_in_half_precision_it_is_the_dequantized_model_in_that(name, dtype, tmp_path):
    """Tables keep their own precision: weights are rounded once, when they have been decoded."""
    denoiser, arguments, _ = packed(name)
    denoiser.save_pretrained(tmp_path / "packed")
    floats = AutoModel.from_pretrained(str(tmp_path / "packed"))
    floats.dequantize()
    floats.save_pretrained(tmp_path / "float")
    narrow = AutoModel.from_pretrained(str(tmp_path / "packed"), dtype=dtype)
    expected = AutoModel.from_pretrained(str(tmp_path / "float"), dtype=dtype)
    before = dict(packed_layers(denoiser))
    assert all(torch.equal(layer.decoded(), before[path].decoded()) for path, layer in packed_layers(narrow))
    assert narrow.dtype == expected.dtype
    for path, layer in packed_layers(narrow):
        assert layer.weight.dtype == expected.get_submodule(path).weight.dtype, path
        assert layer.bias is None or layer.bias.dtype == expected.get_submodule(path).bias.dtype, path
    output = predict_in(narrow, arguments, dtype)
    assert torch.equal(output, predict_in(expected, arguments, dtype)) and output.isfinite().all()


@torch.no_grad()
def predict_in(denoiser, arguments, dtype):
    """As `predict`, with inputs of a precision that the denoiser's first parameter need not have."""
    cast = {name: value.to(dtype) if _is_float(value) else value for name, value in arguments.items()}
    cast = {name: [each.to(dtype) for each in v] if _is_floats(v) else v for name, v in cast.items()}
    if isinstance(cast.get("added_cond_kwargs"), dict):
        extra = cast["added_cond_kwargs"]
        cast["added_cond_kwargs"] = {name: v.to(dtype) if _is_float(v) else v for name, v in extra.items()}
    sample = denoiser(**cast, return_dict=False)[0]
    return torch.cat([part.flatten() for part in sample])


def _is_float(value):
    return torch.is_tensor(value) and value.is_floating_point()


def _is_floats(value):
    return isinstance(value, list) and all(_is_float(each) for each in value)


def test_layers_that_wan_keeps_in_float32_stay_so(tmp_path):
    denoiser, _, _ = packed("wan")
    denoiser.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), dtype=torch.float16)
    for path, layer in packed_layers(loaded):
        wanted = torch.float32 if "time_embedder" in path.split(".") else torch.float16
        assert layer.weight.dtype == layer.bias.dtype == wanted, path


def kept_float(denoiser, paths):
    """Patterns of the modules that are not converted when a denoiser is quantized as it is loaded."""
    in_float32 = [rf"(.*\.)?{name}" for name in denoiser._keep_in_fp32_modules or []]
    return [rf"{path}(\..*)?" for path in (*paths, *in_float32)]


@pytest.mark.parametrize("method", ["mse-3", "kmeans-4"])
@pytest.mark.parametrize("name", OTHERS)
def test_quantized_on_loading_it_is_the_packed_model(name, method, tmp_path):
    """Read from shards, and in the precision of the file, whatever it is loaded in."""
    left = {"flux": "proj_out", "dit": "transformer_blocks.1"}.get(name, "nothing")
    denoiser = build(name).half()
    denoiser.save_pretrained(tmp_path / "float", max_shard_size=20_000)
    arguments = inputs(name, build(name))
    expected = AutoModel.from_pretrained(str(tmp_path / "float"), dtype=torch.float16)
    QuantizedModel(expected, exclude=kept_float(expected, [left])).pack(method, show=False)
    told = Qua2SeDiMoConfig(method, modules_to_not_convert=[left])
    loaded = AutoModel.from_pretrained(str(tmp_path / "float"), quantization_config=told, dtype=torch.float16)
    state, wanted = loaded.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)
    assert told.weights is None  # the user's own: it can quantize another model
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModel.from_pretrained(str(tmp_path / "packed"), dtype=torch.float16)
    output = predict_in(loaded, arguments, torch.float16)
    assert torch.equal(predict_in(again, arguments, torch.float16), output)
    assert torch.equal(predict_in(expected, arguments, torch.float16), output)


def test_each_shard_is_let_go_before_the_next_is_read(tmp_path, monkeypatch):
    build("flux").save_pretrained(tmp_path, max_shard_size=30_000)
    read, alive = diffusers.models.model_loading_utils.load_state_dict, []
    matrices = []

    def reading(*args, **kwargs):
        alive.append(sum(each() is not None for each in matrices))
        state_dict = read(*args, **kwargs)
        matrices.extend(weakref.ref(tensor) for name, tensor in state_dict.items() if tensor.ndim == 2)
        return state_dict

    monkeypatch.setattr(diffusers.models.model_loading_utils, "load_state_dict", reading)
    AutoModel.from_pretrained(str(tmp_path), quantization_config=Qua2SeDiMoConfig("mse-4"))
    assert len(alive) > 5 and max(alive) == 0


@pytest.mark.parametrize(
    "told",
    [
        PipelineQuantizationConfig(quant_mapping={"transformer": Qua2SeDiMoConfig("mse-4")}),
        PipelineQuantizationConfig(
            quant_backend="qua2sedimo", quant_kwargs={"method": "mse-4"}, components_to_quantize=["transformer"]
        ),
    ],
    ids=["mapping", "backend"],
)
def test_a_pipeline_is_quantized_on_loading(told, tmp_path):
    entry = ZOO["pixart"]
    pipeline = entry.build_pipeline()
    pipeline.save_pretrained(tmp_path)
    QuantizedModel(pipeline.transformer).pack("mse-4", show=False)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=told)
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
    assert np.array_equal(entry.draw(loaded), entry.draw(pipeline))


def test_one_configuration_quantizes_both_denoisers_of_a_pipeline(tmp_path):
    entry = ZOO["wan_2_2"]
    entry.build_pipeline().save_pretrained(tmp_path)
    told = Qua2SeDiMoConfig("mse-4")
    mapping = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(entry.denoiser_names, told))
    loaded = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping)
    first, second = (dict(packed_layers(getattr(loaded, name))) for name in entry.denoiser_names)
    assert first.keys() == second.keys() and first
    assert not any(torch.equal(first[path].table, second[path].table) for path in first)


@EACH
def test_dequantized_it_computes_and_saves_as_a_float_model(name, tmp_path):
    denoiser, arguments, output = packed(name)
    denoiser.save_pretrained(tmp_path / "packed")
    loaded = AutoModel.from_pretrained(str(tmp_path / "packed"))
    loaded.dequantize()
    assert not list(packed_layers(loaded))
    assert torch.equal(predict(loaded, arguments), output)
    loaded.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    again = AutoModel.from_pretrained(str(tmp_path / "float")).requires_grad_(False)  # with it PyTorch rounds otherwise
    assert torch.equal(predict(again, arguments), output)


def test_it_is_saved_over_the_folder_it_is_mapped_from(tmp_path):
    denoiser, arguments, output = packed("flux")
    denoiser.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    loaded.save_pretrained(tmp_path)
    assert torch.equal(predict(loaded, arguments), output)
    assert torch.equal(predict(AutoModel.from_pretrained(str(tmp_path)), arguments), output)


def test_a_single_file_is_quantized_on_loading(tmp_path):
    denoiser = build("flux")
    denoiser.save_pretrained(tmp_path)
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        str(tmp_path / WEIGHTS), config=str(tmp_path), quantization_config=Qua2SeDiMoConfig("mse-4")
    )
    arguments = inputs("flux", denoiser)
    expected = QuantizedModel(denoiser).pack("mse-4", show=False)
    assert torch.equal(predict(loaded, arguments), predict(expected, arguments))


WAYS = {
    "variant": ({"variant": "fp16"}, {"variant": "fp16"}),
    "variant in shards": ({"variant": "fp16", "max_shard_size": 4000}, {"variant": "fp16"}),
    "pickled": ({"safe_serialization": False}, {"use_safetensors": False}),
    "pickled, found": ({"safe_serialization": False}, {}),
    "device map": ({}, {"device_map": "cpu"}),
    "device map found": ({}, {"device_map": "auto"}),
    "not mapped": ({}, {"disable_mmap": True}),
}


@pytest.mark.parametrize(("saving", "loading"), WAYS.values(), ids=WAYS)
def test_it_is_saved_and_loaded_in_every_way_of_diffusers(saving, loading, tmp_path):
    denoiser, arguments, output = packed("flux")
    denoiser.save_pretrained(tmp_path / "part", **saving)
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="part", **loading)
    assert loaded.is_quantized and torch.equal(predict(loaded, arguments), output)


def test_it_is_loaded_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    """By its id, through links, without a network; in shards, of which the index is in the cache, too."""
    denoiser, arguments, output = packed("flux")
    denoiser.save_pretrained(tmp_path / "saved" / "transformer", max_shard_size=4000)
    use_cache(monkeypatch, tmp_path / "home")
    hub_cache(tmp_path / "home", "someone/packed", tmp_path / "saved")
    loaded = AutoModel.from_pretrained("someone/packed", subfolder="transformer", local_files_only=True)
    assert torch.equal(predict(loaded, arguments), output)


@pytest.mark.parametrize("told", [None, Qua2SeDiMoConfig("mse-4")], ids=["packed", "float"])
def test_a_device_map_that_says_disk_is_refused(told, tmp_path):
    (build("flux") if told else packed("flux")[0]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="device_map: says disk"):
        AutoModel.from_pretrained(
            str(tmp_path), device_map={"": "cpu", "proj_out": "disk"}, offload_folder=str(tmp_path), quantization_config=told
        )


def test_no_method_and_no_weight_to_quantize_are_told(tmp_path):
    build("dit").save_pretrained(tmp_path)
    for told, message in (
        (Qua2SeDiMoConfig(), "no method"),
        (Qua2SeDiMoConfig("mse-4", ["transformer_blocks", "proj_out_1", "proj_out_2", "pos_embed"]), "no weight"),
    ):
        with pytest.raises(InputError, match=message):
            AutoModel.from_pretrained(str(tmp_path), quantization_config=told)
