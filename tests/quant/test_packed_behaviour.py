"""Packed denoisers under what is done to models: copied, pickled, moved, offloaded, cast, compiled, loaded into."""

import copy
import gc
import pickle
import shutil
import weakref

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoModel, WanTransformer3DModel
from diffusers.hooks import apply_group_offloading
from packed_models import NAMES, OTHERS, build, mixed, packed, predict, quantized_model
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO

from errors import InputError
from quant import QuantizedModel
from quant.joined import Joined
from quant.layers import packed_layers

EACH = pytest.mark.parametrize("name", NAMES)
OTHERS_EACH = pytest.mark.parametrize("name", OTHERS)
FEW = pytest.mark.parametrize("name", ["flux", "z_image", "tiny_sdxl", "tiny_dit"])
CPU = torch.device("cpu")


@torch.no_grad()
def output_of(denoiser, arguments):
    """As `predict`, the arguments as they are: a denoiser whose parameters wait elsewhere tells nothing of precision."""
    sample = denoiser(**arguments, return_dict=False)[0]
    return torch.cat([part.flatten() for part in sample])


def pickled(denoiser):
    return pickle.loads(pickle.dumps(denoiser))


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_the_same_and_apart(name, copied):
    denoiser, arguments, output = packed(name)
    other = copied(denoiser)
    assert torch.equal(predict(other, arguments), output)
    next(layer for _, layer in packed_layers(other)).codes.zero_()
    assert not torch.equal(predict(other, arguments), output)
    assert torch.equal(predict(denoiser, arguments), output)


@EACH
def test_casts_leave_the_tables_as_they_are(name):
    denoiser, _, _ = packed(name)
    other, theirs = copy.deepcopy(denoiser), dict(packed_layers(denoiser))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        nn.Module.to(other, dtype)
        for path, layer in packed_layers(other):
            assert layer.weight.dtype == dtype and layer.table.dtype == theirs[path].table.dtype
            assert torch.equal(layer.decoded(), theirs[path].decoded()), path


@FEW
def test_a_cast_of_the_model_itself_is_refused(name):
    for cast in (lambda model: model.to(torch.float16), lambda model: model.half(), lambda model: model.float()):
        with pytest.raises(ValueError, match="quantized model"):
            cast(packed(name)[0])


@EACH
def test_layers_wait_on_the_host_until_they_run(name, tmp_path):
    """accelerate's hooks, as `enable_sequential_cpu_offload` puts them on a denoiser."""
    if name == "tiny_hunyuan":
        pytest.skip("its pooler reads weights without calling their layers, so diffusers leaves it out of this")
    denoiser, arguments, output = packed(name)
    other = copy.deepcopy(denoiser)
    cpu_offload(other, CPU, offload_buffers=len(other._parameters) > 0)
    assert all(layer.codes.is_meta for _, layer in packed_layers(other))
    for _ in range(2):
        assert torch.equal(output_of(other, arguments), output)
    with pytest.raises(InputError, match="offloaded"):
        other.save_pretrained(tmp_path / "never")
    other.dequantize()
    assert torch.equal(output_of(other, arguments), output)


@pytest.mark.parametrize("how", ["leaf_level", "block_level", "disk"])
@EACH
def test_groups_wait_on_the_host_until_they_run(name, how, tmp_path):
    if name == "tiny_hunyuan" and how != "block_level":
        pytest.skip("its pooler reads weights without calling their layers")
    if name == "tiny_dit" and how == "disk":
        pytest.skip("is refused, see below")
    denoiser, arguments, output = packed(name)
    other = copy.deepcopy(denoiser)
    options = {"offload_type": how, "num_blocks_per_group": 1}
    if how == "disk":
        options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path / "disk")}
    apply_group_offloading(other, onload_device=CPU, offload_device=CPU, **options)
    for _ in range(2):
        assert torch.equal(output_of(other, arguments), output)
    if how == "disk":
        with pytest.raises(InputError, match="offloaded"):
            other.save_pretrained(tmp_path / "saved")
    else:
        other.save_pretrained(tmp_path / "saved")
        assert torch.equal(predict(type(other).from_pretrained(tmp_path / "saved"), arguments), output)


@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_shared_weights_are_not_taken_to_the_disk(how, tmp_path):
    """diffusers would write them once they have been let go."""
    denoiser, arguments, _ = packed("tiny_dit")
    for other in (copy.deepcopy(denoiser), pickled(denoiser)):
        options = {"offload_type": how, "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
        apply_group_offloading(other, onload_device=CPU, offload_device=CPU, **options)
        with pytest.raises(InputError, match="share weights"):
            output_of(other, arguments)


def test_float_weights_that_were_shared_are_taken_to_the_disk(tmp_path):
    denoiser, arguments, output = packed("tiny_dit")
    other = copy.deepcopy(denoiser)
    other.dequantize()
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(other, onload_device=CPU, offload_device=CPU, **options)
    assert torch.equal(output_of(other, arguments), output)


@pytest.mark.parametrize("name", ["flux", "pixart", "wan_2_2"])
def test_whole_models_wait_on_the_host_until_they_run(name):
    entry = ZOO[name]
    pipeline = entry.build_pipeline()
    for attribute in entry.denoiser_names:
        QuantizedModel(getattr(pipeline, attribute)).pack("kmeans-4", show=False)
    drawn = entry.draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.array_equal(entry.draw(pipeline), drawn)


@EACH
def test_layerwise_casting_casts_the_biases_alone(name):
    """The same as rounding to float8 the biases of the layers that are cast."""
    denoiser, arguments, _ = packed(name)
    cast, rounded = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    count = 0
    for path, module in cast.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("layerwise_casting") is not None:
            count += hasattr(module, "codes")
            for parameter in rounded.get_submodule(path).parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    assert count
    for _ in range(2):
        assert torch.equal(output_of(cast, arguments), output_of(rounded, arguments))


@pytest.mark.parametrize(
    "name",
    [name if name in ("flux", "wan") else pytest.param(name, marks=pytest.mark.slow) for name in (*OTHERS, "tiny_dit")],
)
def test_it_compiles_to_one_graph(name):
    denoiser, arguments, output = packed(name)
    torch._dynamo.reset()
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    assert torch.equal(output_of(compiled, arguments), output)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler of C++")
def test_a_layer_is_compiled_to_native_code():
    model = nn.Sequential(nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 6))
    QuantizedModel(model).pack({"0": "kmeans-3", "2": "mse-4"}, show=False)
    torch._dynamo.reset()
    input = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="inductor")(input)
        torch.testing.assert_close(compiled, model(input), rtol=1e-6, atol=1e-6)


@OTHERS_EACH
def test_its_state_loads_into_another_of_the_same_kind(name, tmp_path):
    denoiser, arguments, output = packed(name)
    save_file(denoiser.state_dict(), tmp_path / "state.safetensors")
    other = build(name)
    for parameter in other.parameters():
        parameter.data *= 0.5
    model = quantized_model(name, other)
    model.pack(mixed(model), show=False)
    assert not torch.equal(predict(other, arguments), output)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(predict(other, arguments), output)


def test_loaded_tables_keep_the_precision_they_were_saved_in():
    """Also where this layer's own are narrower: float16 into bfloat16 would round, zero points of int16 into int8 wrap."""
    weight = torch.linspace(100, 101, 32).view(2, 16)  # far from zero: zero points of int16
    layers = []
    for dtype, shift in ((torch.float32, 0), (torch.bfloat16, 100)):
        layer = nn.Linear(16, 2)
        layer.weight.data = (weight - shift).to(dtype)
        model = nn.Sequential(layer)
        QuantizedModel(model).pack("mse-4", show=False)
        layers.append(model)
    wide, narrow = layers
    assert (wide[0].zero.dtype, narrow[0].zero.dtype) == (torch.int16, torch.int8)
    narrow.load_state_dict(wide.state_dict())
    assert torch.equal(narrow[0].decoded(), wide[0].decoded())


def test_float_weights_do_not_load_into_a_packed_model():
    denoiser, _, _ = packed("dit")
    with pytest.raises(RuntimeError, match=r"Missing key.*codes"):
        copy.deepcopy(denoiser).load_state_dict(build("dit").state_dict())


def fuses(name):
    """Whether diffusers fuses projections of the float model, and it then runs.

    Stable Diffusion 3 does not: its last block has no output for the text.
    """
    denoiser = build(name)
    if name == "sd3" or not hasattr(denoiser, "fuse_qkv_projections"):
        return False
    denoiser.fuse_qkv_projections()
    return any(path.endswith(("to_qkv", "to_kv")) for path, _ in denoiser.named_modules())


FUSING = [name for name in NAMES if fuses(name)]


@pytest.mark.parametrize("name", FUSING)
def test_fused_projections_stay_packed_and_compute_the_same(name, tmp_path):
    denoiser, arguments, output = packed(name)
    fused = copy.deepcopy(denoiser)
    names = fused.state_dict().keys()
    fused.fuse_qkv_projections()
    assert any(isinstance(module, Joined) for module in fused.modules())
    for each in (fused, pickled(fused), copy.deepcopy(fused)):
        assert torch.equal(predict(each, arguments), output)
    assert fused.state_dict().keys() == names
    fused.save_pretrained(tmp_path)
    assert torch.equal(predict(type(fused).from_pretrained(tmp_path), arguments), output)
    fused.dequantize()
    assert torch.equal(predict(fused, arguments), output)
    fused.unfuse_qkv_projections()
    assert torch.equal(predict(fused, arguments), output)


def test_a_model_that_is_let_go_is_gone_at_once():
    """Its memory comes back without a search for what refers to one another."""
    for fuse in (False, True):
        denoiser = copy.deepcopy(packed("pixart")[0])
        if fuse:
            denoiser.fuse_qkv_projections()
        gc.collect()
        gc.disable()
        try:
            codes = weakref.ref(denoiser.transformer_blocks[0].attn1.to_q.codes)
            del denoiser
            assert codes() is None
        finally:
            gc.enable()


def test_float_projections_are_fused_and_not_saved_twice(tmp_path):
    """Beside packed layers: those of Wan's second attention, which knows images, have a name of their own."""
    denoiser = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        image_dim=8,
        added_kv_proj_dim=24,
    )
    QuantizedModel(denoiser, exclude=[".*attn.*"]).pack("mse-4", show=False)
    names = denoiser.state_dict().keys()
    denoiser.fuse_qkv_projections()
    assert "blocks.0.attn2.to_added_kv.weight" in denoiser.state_dict()
    denoiser.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(str(tmp_path)).state_dict().keys() == names


def test_a_fused_model_is_not_packed():
    denoiser = build("pixart")
    denoiser.fuse_qkv_projections()
    with pytest.raises(InputError, match=r"attn1\.to_qkv: .* unfuse"):
        QuantizedModel(denoiser)
