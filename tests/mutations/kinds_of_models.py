"""Multiquantizers, packed models, and the files of models as people have them."""

import functools
import json
import shutil
import sys
from unittest import mock

import torch
from compvis_checkpoint import compvis_state
from conftest import tiny, tiny_dit, tiny_model
from packed_models import packed
from safetensors.torch import save_file
from small_clip import save_clip

from models import any_pipeline, components
from models.clip import load_clip
from models.components import pickled_dtypes_of
from models.families import FAMILIES
from models.lora import fuse, open_lora
from models.pipelines import EMBEDDED_FOLDER, load_denoiser, load_sampler
from models.repository import open_repository
from mutations import mutate
from mutations.kind import Kind
from mutations.kinds_of_runs import rewritten
from quant import multiquantizer
from quant.files import load_checkpoint, save_checkpoint
from quant.packed_folder import load_packed, save_packed
from stages import quantize, sampling
from stages.labelling import eval_random
from stages.quantize_card import base_header

CPU = torch.device("cpu")
DIT, SDV15 = FAMILIES["dit"], FAMILIES["sdv15"]


@functools.cache
def tiny_weights():
    """A denoiser of one block, which nothing changes, and its multiquantizer's content."""
    return tiny_dit(layers=1)


def small_model():
    return tiny_model("dit", tiny_weights())


def make_multiquantizer(folder):
    multiquantizer.build(small_model(), folder / "mq.pt")
    return folder / "mq.pt"


def read_multiquantizer(path):
    """Its entries, as they are found without weights and with them, and the weights that they make."""
    multiquantizer.read(path, "dit")
    model = multiquantizer.load(path, small_model())
    return model.entries


def make_partial(folder):
    path = make_multiquantizer(folder)
    content = load_checkpoint(path)
    for key in list(content["slots"])[::2]:
        del content["slots"][key]
    save_checkpoint(content, folder / "mq.pt.partial")
    path.unlink()
    return folder / "mq.pt.partial"


def read_partial(path):
    return multiquantizer._resume(path, small_model(), overwrite=False)


def make_packed(folder):
    packed("tiny_dit")[0].save_pretrained(folder / "packed" / "transformer")
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (folder / "packed" / "model_index.json").write_text(json.dumps(index))
    return folder / "packed" / "transformer" / "config.json"


def read_packed(path):
    return open_repository(path.parents[1]).load_component("transformer", torch.float32).state_dict()


def make_packed_module(folder):
    save_packed(packed("tiny_dit")[0], folder / "module")
    return folder / "module" / "quantization_config.json"


def read_packed_module(path):
    return load_packed(tiny("dit"), path.parent).state_dict()


def make_lora(folder):
    weight = tiny("sdv15").conv_in.weight
    state = {
        "unet.conv_in.lora_A.weight": torch.ones(2, *weight.shape[1:]),
        "unet.conv_in.lora_B.weight": torch.ones(len(weight), 2, 1, 1),
    }
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {"conv.*": 2}, "r": 2})
    )
    return folder / "adapter_config.json"


@functools.cache
def unet():
    return tiny("sdv15")


def read_lora(path):
    module = torch.nn.Module()
    module.conv_in = torch.nn.Conv2d(*unet().conv_in.weight.shape[1::-1], 3).requires_grad_(False)
    adapter = open_lora(path.parent)
    fuse([adapter], {"unet": module}, "StableDiffusionPipeline", {"unet": dict(unet().config), "text_encoder": {}})
    return adapter.key


def both(content, rng):
    """A mutation of JSON where it is JSON, else of bytes."""
    return (
        rng.choice((mutate.of_bytes, mutate.of_json))(content, rng) if content[:1] == b"{" else mutate.of_bytes(content, rng)
    )


def files_of(path):
    return sorted(each for each in path.parent.iterdir() if each.is_file())


def make_pipeline(name):
    def make(folder):
        return shutil.copytree(EMBEDDED_FOLDER / name, folder / name) / "model_index.json"

    return make


def small_files(path):
    """The files of a pipeline's folder, those of weights seldom."""
    return sorted(each for each in path.parent.rglob("*") if each.is_file() and each.suffix != ".md")


def read_pipeline(family):
    def read(path):
        """As a script does: what its flags need to know, then the denoiser, then all of it."""
        folder = str(path.parent)
        args = eval_random.parse_args(family, ["--model_id", folder, "--steps", "5"])
        sampling.check_sampling(args, family, CPU)
        load_denoiser(family, folder, CPU)
        load_sampler(family, folder, CPU)

    return read


def read_to_quantize(path):
    """As quantize.py does before it makes anything, and then the denoiser."""
    flags = ["quantize.py", "--model_id", str(path.parent), "--output", str(path.parents[1] / "out")]
    with mock.patch.object(sys, "argv", flags), components.one_line(path, "configuration"):
        job = quantize.Job(quantize.parse_args(), CPU)
    for name in job.names:
        job._denoiser(name)
    files = any_pipeline.needed_files(job.source, job.names, job.variants)
    job.source.fetch(files.values())


def make_single_file(folder):
    pipeline = load_sampler(SDV15, "embedded", CPU).pipeline
    save_file(
        {name: weight.contiguous().clone() for name, weight in compvis_state(pipeline).items()}, folder / "v1.safetensors"
    )
    shutil.copytree(EMBEDDED_FOLDER / "sdv15", folder / "v1")
    return folder / "v1.safetensors"


def read_single_file(path):
    load_denoiser(SDV15, str(path), CPU)


def make_bin(folder):
    torch.save({"a": torch.ones(2, 2), "b": torch.ones(2, 2, dtype=torch.int8)}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def make_card(folder):
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# A model\n")
    return folder / "README.md"


MODELS = (
    Kind(
        "multiquantizer",
        make_multiquantizer,
        read_multiquantizer,
        (
            *("quant.files.load_checkpoint", "quant.multiquantizer.load", "quant.multiquantizer.read"),
            *("quant.multiquantizer.holds", "quant.multiquantizer.stitch", "quant.multiquantizer.check_replaceable"),
            "quant.multiquantizer.build",
            "stages.multi_chkpt.key",
        ),
        has_digest=True,
        rewrite=rewritten(load_checkpoint, save_checkpoint),
        count=30,
    ),
    Kind(
        "partial multiquantizer",
        make_partial,
        read_partial,
        ("quant.multiquantizer._resume",),
        has_digest=True,
        rewrite=rewritten(load_checkpoint, save_checkpoint),
        count=100,
    ),
    Kind("packed denoiser", make_packed, read_packed, (), has_digest=True, mutate=both, beside=files_of, count=4),
    Kind(
        "packed module",
        make_packed_module,
        read_packed_module,
        (
            *("quant.packed_folder._read_configuration", "quant.packed_folder._read_tensors"),
            *("quant.digests._read", "quant.digests._told", "quant.digests.with_digests"),
        ),
        has_digest=True,
        mutate=both,
        beside=files_of,
        count=10,
    ),
    Kind("LoRA", make_lora, read_lora, ("models.lora._load", "models.lora.key"), mutate=both, beside=files_of),
    Kind(
        "DiT pipeline",
        make_pipeline("dit"),
        read_pipeline(DIT),
        (
            *("models.repository.read_json", "models.repository.fetch", "models.components.load_component"),
            *("models.components.dtypes_of", "models.pipelines._assemble"),
            *("models.any_pipeline.load_pipeline", "stages.quantize_files._write_index"),
        ),
        mutate=both,
        beside=small_files,
        count=5,
    ),
    Kind("pipeline to quantize", make_pipeline("dit"), read_to_quantize, (), mutate=both, beside=small_files, count=10),
    Kind("SD 1.5 pipeline", make_pipeline("sdv15"), read_pipeline(SDV15), (), mutate=both, beside=small_files, count=3),
    Kind(
        "single file",
        make_single_file,
        read_single_file,
        (
            *("models.single_file._read", "models.single_file.check_readable", "models.single_file._stand_ins"),
            "models.single_file._clip_tokenizer",
        ),
        count=1,
    ),
    Kind("pickled weights", make_bin, pickled_dtypes_of, ("models.components.pickled_dtypes_of",)),
    Kind(
        "CLIP",
        lambda folder: save_clip(folder / "clip") / "config.json",
        lambda path: load_clip(str(path.parent)) and None,
        ("models.clip._from_pretrained",),
        mutate=both,
        beside=files_of,
        count=10,
    ),
    Kind(
        "model card",
        make_card,
        lambda path: base_header(open_repository(path.parent)),
        ("stages.quantize_card.base_header",),
    ),
)
