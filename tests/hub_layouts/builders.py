"""The published repositories at small width: the real files' names, forms, keys and precisions, random weights.

Widths, the text encoders' depth and the sizes of vocabularies are small, and pictures are of 64 pixels; blocks,
layers and all else are the real ones. Files that no program here reads hold a few bytes that nothing can read.
"""

import inspect
import json
from types import SimpleNamespace

import diffusers
import torch
import transformers
from compvis_checkpoint import compvis_state
from safetensors.torch import save_file

from hub_layouts import published, vocabularies
from hub_layouts.configs import CONFIGS
from models import geometry
from models.single_file import SD1_CONFIG

UNREADABLE = b"\x89not for this program"
SMALL_T5 = {"d_ff": 96, "d_kv": 12, "d_model": 48, "num_decoder_layers": 2, "num_heads": 4, "num_layers": 2}
SMALL_CLIP = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL_CLIP_2 = SMALL_CLIP | {"hidden_size": 40, "projection_dim": 40}
SMALL_VAE = {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8, "sample_size": 64}
SMALL_UNET = {"sample_size": 8, "norm_num_groups": 8, "addition_time_embed_dim": 8}
SMALL_PIXART = {
    "attention_head_dim": 12,
    "caption_channels": 48,
    "cross_attention_dim": 48,
    "num_attention_heads": 4,
    "sample_size": 8,
}
SMALL = {  # name -> component -> what differs from the published configuration
    "pixart_alpha": {"transformer": SMALL_PIXART, "text_encoder": SMALL_T5},
    "pixart_sigma": {"transformer": SMALL_PIXART, "text_encoder": SMALL_T5},
    "hunyuan": {
        "transformer": {
            "attention_head_dim": 12,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 48,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "pooled_projection_dim": 40,
            "sample_size": 8,
        },
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
        "text_encoder_2": SMALL_T5,
    },
    "sdxl": {
        "unet": SMALL_UNET
        | {"attention_head_dim": [1, 2, 3], "block_out_channels": [8, 16, 24], "cross_attention_dim": 24 + 40}
        | {"projection_class_embeddings_input_dim": 40 + 6 * 8},
        "text_encoder": SMALL_CLIP | {"projection_dim": 24},
        "text_encoder_2": SMALL_CLIP_2,
    },
    "sdxl_refiner": {
        "unet": SMALL_UNET
        | {"attention_head_dim": [1, 2, 3, 3], "block_out_channels": [8, 16, 24, 24], "cross_attention_dim": 40}
        | {"projection_class_embeddings_input_dim": 40 + 5 * 8},
        "text_encoder_2": SMALL_CLIP_2,
    },
    "dit": {"transformer": {"attention_head_dim": 12, "num_attention_heads": 2, "sample_size": 8}},
    "sdv15": {
        "unet": {"attention_head_dim": 4, "block_out_channels": [8, 16, 24, 24], "cross_attention_dim": 24}
        | {"norm_num_groups": 8, "sample_size": 8},
        "text_encoder": SMALL_CLIP | {"projection_dim": 24},
    },
}
# (name, component) -> numbers of files that its plain weights and its fp16 ones lie in; None: there are none.
SHARDS = {("pixart_alpha", "text_encoder"): (4, 2), ("pixart_sigma", "text_encoder"): (2, None)}
SHARDS |= {("hunyuan", "text_encoder_2"): (2, None), ("pixart_alpha", "transformer"): (1, None)}
WITH_FP16 = ("pixart_alpha", "sdxl", "sdxl_refiner")
TOKENIZERS = {  # name -> folder -> what writes it
    "pixart_alpha": {"tokenizer": lambda folder: vocabularies.write_t5(folder, with_added_tokens=True)},
    "pixart_sigma": {"tokenizer": lambda folder: vocabularies.write_t5(folder, with_added_tokens=False)},
    "hunyuan": {"tokenizer": vocabularies.write_bert, "tokenizer_2": vocabularies.write_mt5},
    "sdxl": {
        "tokenizer": vocabularies.write_clip,
        "tokenizer_2": lambda folder: vocabularies.write_clip(folder, pad_token="!"),
    },
    "sdxl_refiner": {"tokenizer_2": lambda folder: vocabularies.write_clip(folder, pad_token="!")},
    "dit": {},
}
TEXT_CLASSES = {
    "T5EncoderModel": transformers.T5Config,
    "BertModel": transformers.BertConfig,
    "CLIPTextModel": transformers.CLIPTextConfig,
    "CLIPTextModelWithProjection": transformers.CLIPTextConfig,
}
VOCAB_SIZES = {
    "T5EncoderModel": vocabularies.t5_vocab_size,
    "BertModel": lambda: len(vocabularies.wordpieces()),
    "CLIPTextModel": lambda: len(vocabularies.clip_model()["vocab"]),
    "CLIPTextModelWithProjection": lambda: len(vocabularies.clip_model()["vocab"]),
}


def build(name, folder, **changes):
    """Write a family's repository, or `sdxl_refiner`'s, into `folder`; gives the folder.

    `changes` are of the denoiser's configuration, for fewer layers.
    """
    torch.manual_seed(0)
    vocabularies.write_json(folder / "model_index.json", published.INDICES[name])
    for component, real in CONFIGS[name].items():
        if component == "scheduler":
            vocabularies.write_json(folder / component / "scheduler_config.json", real)
            continue
        config = small(name, component, real) | (changes if component in ("unet", "transformer") else {})
        vocabularies.write_json(folder / component / "config.json", config)
        state = module_of(name, component, config).state_dict()
        _save_published(name, component, folder / component, _published_names(config, state))
    for component, write in TOKENIZERS[name].items():
        write(folder / component)
    _fill(name, folder)
    return folder


def build_checkpoint(path):
    """Write Stable Diffusion 1.5's single file and, beside it, the project's own configuration of it, both small."""
    torch.manual_seed(0)
    beside = path.with_suffix("")
    modules = {}
    for file in sorted(SD1_CONFIG.rglob("*.json")):
        component, config = file.parent.name, json.loads(file.read_text())
        if file.name == "config.json":
            config = small("sdv15", component, config)
            modules[component] = module_of("sdv15", component, config)
        vocabularies.write_json(beside / file.relative_to(SD1_CONFIG), config)
    scheduler = diffusers.PNDMScheduler.from_pretrained(beside / "scheduler")
    state = compvis_state(SimpleNamespace(**modules, scheduler=scheduler))
    torch.save({"state_dict": state, "global_step": 840000}, path)
    return path


def build_vocabulary(folder):
    """Write the repository that the checkpoint's vocabulary is taken from; gives the folder."""
    vocabularies.write_clip(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    vocabularies.write_json(folder / "config.json", {"architectures": ["CLIPModel"], "model_type": "clip"})
    vocabularies.write_json(folder / "preprocessor_config.json", {"crop_size": 224, "size": 224})
    _fill("clip", folder)
    return folder


def small(name, component, real):
    """The published configuration of a component with the small one's widths."""
    changes = SMALL_VAE if component == "vae" else SMALL[name][component]
    if "architectures" in real:
        changes = changes | {"vocab_size": VOCAB_SIZES[real["architectures"][0]]()}
    return real | changes


def module_of(name, component, config):
    """The module that a configuration describes, its random weights in float32, on torch's default device."""
    if "architectures" in config:
        class_name = config["architectures"][0]
        text_config = TEXT_CLASSES[class_name](**config | {"dtype": "float32", "torch_dtype": "float32"})
        return getattr(transformers, class_name)(text_config)
    class_name = "AutoencoderKL" if component == "vae" else _denoiser_class(name)
    module_class = getattr(diffusers, class_name)
    known = inspect.signature(module_class.__init__).parameters
    module = module_class(**{key: value for key, value in config.items() if key in known})
    if name == "dit" and component == "transformer":  # its file holds one embedder as often as there are blocks
        first = module.transformer_blocks[0].norm1.emb.state_dict()
        for block in module.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return module


def _denoiser_class(name):
    return "UNet2DConditionModel" if name == "sdxl_refiner" else geometry.GEOMETRIES[name][0]


def _published_names(config, state):
    """Weights by the names of the library's version that wrote the files: transformers 4, diffusers as now."""
    if config.get("model_type") == "t5":
        return {name: weight for name, weight in state.items() if name != "encoder.embed_tokens.weight"}
    if config.get("model_type") == "clip_text_model":
        return {_with_text_model(name): weight for name, weight in state.items()}
    return state


def _with_text_model(name):
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _save_published(name, component, folder, state):
    stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
    if name == "dit":
        torch.save(state, folder / f"{stem}.bin")
        return
    plain, half = SHARDS.get((name, component), (1, 1 if name in WITH_FP16 else None))
    save_weights(folder, stem, state, plain)
    if half is not None:
        save_weights(folder, stem, {name: weight.half() for name, weight in state.items()}, half, variant="fp16")


def save_weights(folder, stem, state, num_files=1, variant=None, suffix="safetensors"):
    """Write weights as both libraries name such files: one, or several and their index."""
    marked = f"{stem}.{variant}" if variant else stem
    if num_files == 1:
        return _save(state, folder / f"{marked}.{suffix}")
    names, weight_map = list(state), {}
    for number in range(num_files):
        file = f"{marked}-{number + 1:05}-of-{num_files:05}.{suffix}"
        part = names[number * len(names) // num_files : (number + 1) * len(names) // num_files]
        _save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in state.values())
    index = f"{stem}.{suffix}.index.{variant}.json" if variant else f"{stem}.{suffix}.index.json"
    vocabularies.write_json(folder / index, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _save(state, path):
    state = {name: weight.contiguous().clone() for name, weight in state.items()}
    torch.save(state, path) if path.suffix == ".bin" else save_file(state, path, metadata={"format": "pt"})


def _fill(name, folder):
    """Put something in the place of the files that nothing reads; second autoencoders are as the first."""
    for file in published.files(name) - published.read_files(name):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        first = folder / "vae" / path.name
        path.write_bytes(first.read_bytes() if "vae_" in file and first.exists() else UNREADABLE)
