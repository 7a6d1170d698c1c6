"""Single flipped bits in a multiquantizer and in packed folders: refused in a line, or without any effect."""

import json
import random
import struct
import zipfile

import pytest
import torch
from conftest import tiny_model
from diffusers import AutoModel
from packed_models import packed, predict
from safetensors.torch import load_file, save_file

from errors import InputError
from quant import digests, load_packed, multiquantizer, pretrained, save_packed
from quant.model import QuantizedModel

FEW, MANY = 60, 2000
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


def flips(size, count, seed, *spans):
    """(byte, bit) of single flips: half anywhere in a file of that size, half in its spans (begin, end) of structure."""
    draw = random.Random(seed)
    for number in range(count):
        begin, end = draw.choice(spans) if number % 2 and spans else (0, size)
        yield draw.randrange(begin, end), draw.randrange(8)


def flip(path, content, byte, bit):
    changed = bytearray(content)
    changed[byte] ^= 1 << bit
    path.write_bytes(changed)


def outcome(load, is_same, *diffusers_errors):
    """Whether a damaged file is loaded, without effect; else it was refused in a line."""
    try:
        loaded = load()
    except (InputError, *diffusers_errors) as reason:
        if isinstance(reason, InputError):
            assert "\n" not in str(reason) and len(str(reason)) < 600
        return False
    assert is_same(loaded)
    return True


def equal(one, other):
    """Whether nested plain data and tensors are the same, types and the order of names too."""
    if type(one) is not type(other):
        return False
    if torch.is_tensor(one):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_multiquantizer(count, tmp_path, model):
    path = tmp_path / "dit_mq.pt"
    entries = multiquantizer.build(model, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        spans = (pickled.header_offset, pickled.header_offset + pickled.file_size), (archive.start_dir, len(content))
    model, loaded = tiny_model("dit"), 0
    for byte, bit in flips(len(content), count, count, *spans):
        flip(path, content, byte, bit)
        loaded += outcome(
            lambda: multiquantizer.load(path, model), lambda read: equal(dict(read.entries), entries) and read.slots
        )
    assert 0 < loaded < count  # what an archive says of itself, and no one asks


@pytest.mark.parametrize("count", [FEW // 4, pytest.param(MANY // 10, marks=pytest.mark.slow)])
def test_a_checkpoint_of_a_build(count, tmp_path, model):
    """Whatever is damaged, the build ends with the file that it would have made."""
    path = tmp_path / "dit_mq.pt"
    multiquantizer.build(model, path)
    content, partial = path.read_bytes(), tmp_path / "dit_mq.pt.partial"
    for byte, bit in flips(len(content), count, count):
        flip(partial, content, byte, bit)
        path.unlink(missing_ok=True)
        if outcome(lambda: multiquantizer.build(tiny_model("dit"), path), lambda _: True):
            assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["pixart", pytest.param("tiny_dit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_packed_model_of_diffusers(name, count, tmp_path):
    denoiser, arguments, output = packed(name)
    denoiser.save_pretrained(tmp_path)
    state, errors = dict(denoiser.state_dict()), (OSError, ValueError, AttributeError, TypeError, KeyError)
    for path, share in ((tmp_path / WEIGHTS, 2), (tmp_path / CONFIG, 2)):
        content = path.read_bytes()
        spans, size = [(0, 8 + struct.unpack("<Q", content[:8])[0])], len(content)
        if path.name == CONFIG:
            begin = content.index(b'"quantization_config"')
            spans = [(begin, begin + len(json.dumps(json.loads(content)["quantization_config"], indent=2)))]
            content_spans, spans = spans, []
        loaded = 0
        for byte, bit in flips(size, count // share, count, *spans):
            if path.name == CONFIG:
                byte = content_spans[0][0] + byte % (content_spans[0][1] - content_spans[0][0])
            flip(path, content, byte, bit)
            loaded += outcome(
                lambda: AutoModel.from_pretrained(str(tmp_path)),
                lambda read: (
                    equal(dict(sorted(read.state_dict().items())), dict(sorted(state.items())))
                    and torch.equal(predict(read, arguments), output)
                ),
                *errors,
            )
        path.write_bytes(content)
        assert loaded < count // share // 4


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_packed_module(count, tmp_path):
    def network(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)).eval()

    module = QuantizedModel(network(0)).pack({"0": "mse-4", "2": "kmeans-3"}, show=False)
    save_packed(module, tmp_path)
    state = dict(module.state_dict())
    for path in (tmp_path / "model.safetensors", tmp_path / "quantization_config.json"):
        content = path.read_bytes()
        for byte, bit in flips(len(content), count // 2, count):
            flip(path, content, byte, bit)
            outcome(lambda: load_packed(network(1), tmp_path), lambda read: equal(dict(read.state_dict()), state))
        path.write_bytes(content)


def test_a_folder_that_was_saved_before_there_were_digests(tmp_path, caplog):
    """It loads, since what it was made from may be gone; that it cannot be checked is said, and saved again it can."""
    denoiser, arguments, output = packed("pixart")
    denoiser.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[digests.NAME]
    save_file(tensors, tmp_path / WEIGHTS)
    settings = json.loads((tmp_path / CONFIG).read_text())
    settings["quantization_config"].pop("digest")
    settings["quantization_config"]["version"] = 1
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert "without digests" in caplog.text and torch.equal(predict(loaded, arguments), output)
    loaded.save_pretrained(tmp_path / "again")
    told = json.loads((tmp_path / "again" / CONFIG).read_text())["quantization_config"]
    assert told["version"] == pretrained.VERSION and told["digest"]
