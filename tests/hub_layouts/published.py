"""What the seven repositories on the Hub hold: the names of their files, and their pipelines' indices.

Taken from the repositories' own pages (file lists with sizes, commits, single files), of which public copies exist:

- every file list of a component's folder, but `scheduler`, `tokenizer_2`, `transformer` and `vae` of Hunyuan-DiT, which
  are those listed for its versions 1.1 and 1.2, and `tokenizer_2` and `unet` of the refiner, whose files are known singly;
- `model_index.json` of PixArt-Sigma, Stable Diffusion XL, its refiner and Hunyuan-DiT; PixArt-alpha's from a copy;
- the configurations (`configs`) of Hunyuan-DiT and Stable Diffusion XL, of PixArt-Sigma's denoiser and scheduler, and,
  from copies of the files, of PixArt-alpha's denoiser, T5 and autoencoder.

Inferred, and byte for byte of the listed size: PixArt-alpha's scheduler (PixArt-Sigma's carries PixArt-alpha's version),
both PixArts' tokenizers, DiT's denoiser, scheduler and autoencoder, the refiner's scheduler. Inferred, no size agreeing
or known: PixArt-Sigma's T5 and autoencoder, the last keys of the refiner's U-Net (Stable Diffusion XL's, of the same
version), DiT's index (35.8 kB: most of it the labels of its thousand classes, here made up), the precision in T5's
config.json, and the files that no program here reads: pictures, ONNX, OpenVINO, Flax, single files at the root.
"""

FILES = {  # name -> folder -> files
    "pixart_alpha": {
        "": ".gitattributes README.md model_index.json",
        "asset/images": "model.png teaser.png",
        "scheduler": "scheduler_config.json",
        "text_encoder": """config.json model-00001-of-00004.safetensors model-00002-of-00004.safetensors
            model-00003-of-00004.safetensors model-00004-of-00004.safetensors model.safetensors.index.json
            model.fp16-00001-of-00002.safetensors model.fp16-00002-of-00002.safetensors model.safetensors.index.fp16.json""",
        "tokenizer": "added_tokens.json special_tokens_map.json spiece.model tokenizer_config.json",
        "transformer": "config.json diffusion_pytorch_model.safetensors",
        "vae": "config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors",
    },
    "pixart_sigma": {
        "": ".gitattributes README.md model_index.json",
        "asset": "model.png",
        "scheduler": "scheduler_config.json",
        "text_encoder": """config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors
            model.safetensors.index.json""",
        "tokenizer": "special_tokens_map.json spiece.model tokenizer_config.json",
        "transformer": "config.json diffusion_pytorch_model.safetensors",
        "vae": "config.json diffusion_pytorch_model.safetensors",
    },
    "hunyuan": {
        "": ".gitattributes README.md model_index.json",
        "scheduler": "scheduler_config.json",
        "text_encoder": "config.json model.safetensors",
        "text_encoder_2": """config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors
            model.safetensors.index.json""",
        "tokenizer": "special_tokens_map.json tokenizer_config.json vocab.txt",
        "tokenizer_2": "special_tokens_map.json spiece.model tokenizer_config.json",
        "transformer": "config.json diffusion_pytorch_model.safetensors",
        "vae": "config.json diffusion_pytorch_model.safetensors",
    },
    "sdxl": {
        "": """.gitattributes 01.png LICENSE.md README.md comparison.png model_index.json pipeline.png
            sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors sd_xl_offset_example-lora_1.0.safetensors""",
        "scheduler": "scheduler_config.json",
        "text_encoder": """config.json flax_model.msgpack model.fp16.safetensors model.onnx model.safetensors
            openvino_model.bin openvino_model.xml""",
        "text_encoder_2": """config.json flax_model.msgpack model.fp16.safetensors model.onnx model.onnx_data
            model.safetensors openvino_model.bin openvino_model.xml""",
        "tokenizer": "merges.txt special_tokens_map.json tokenizer_config.json vocab.json",
        "tokenizer_2": "merges.txt special_tokens_map.json tokenizer_config.json vocab.json",
        "unet": """config.json diffusion_flax_model.msgpack diffusion_pytorch_model.fp16.safetensors
            diffusion_pytorch_model.safetensors model.onnx model.onnx_data openvino_model.bin openvino_model.xml""",
        "vae": "config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors",
        "vae_1_0": "config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors",
        "vae_decoder": "config.json model.onnx openvino_model.bin openvino_model.xml",
        "vae_encoder": "config.json model.onnx openvino_model.bin openvino_model.xml",
    },
    "sdxl_refiner": {
        "": """.gitattributes 01.png LICENSE.md README.md comparison.png model_index.json pipeline.png
            sd_xl_refiner_1.0.safetensors sd_xl_refiner_1.0_0.9vae.safetensors""",
        "scheduler": "scheduler_config.json",
        "text_encoder_2": "config.json model.fp16.safetensors model.safetensors",
        "tokenizer_2": "merges.txt special_tokens_map.json tokenizer_config.json vocab.json",
        "unet": "config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors",
        "vae": "config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors",
        "vae_1_0": "config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors",
    },
    "dit": {
        "": ".gitattributes README.md model_index.json",
        "scheduler": "scheduler_config.json",
        "transformer": "config.json diffusion_pytorch_model.bin",
        "vae": "config.json diffusion_pytorch_model.bin",
    },
    # No pipeline: Stable Diffusion 1.5's checkpoint takes its vocabulary from here.
    "clip": {
        "": """.gitattributes README.md config.json flax_model.msgpack merges.txt model.safetensors
            preprocessor_config.json pytorch_model.bin special_tokens_map.json tf_model.h5 tokenizer.json
            tokenizer_config.json vocab.json""",
    },
}


def files(name):
    """The paths of a repository's files."""
    return {f"{folder}/{file}".lstrip("/") for folder, names in FILES[name].items() for file in names.split()}


def read_files(name):
    """Those of them that the libraries read for the pipeline, or the vocabulary, which is all that they fetch."""
    return {file for file in files(name) if _is_read(file)}


def _is_read(file):
    folder, _, base = file.rpartition("/")
    of_others = base.endswith((".msgpack", ".onnx", ".onnx_data", ".xml", ".h5")) or base == "openvino_model.bin"
    at_the_root = not folder and not base.endswith(("json", "merges.txt"))
    return not (of_others or at_the_root or folder.startswith(("asset", "vae_")))


REPOSITORIES = {
    "pixart_alpha": "PixArt-alpha/PixArt-XL-2-512x512",
    "pixart_sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "hunyuan": "Tencent-Hunyuan/HunyuanDiT-Diffusers",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl_refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "dit": "facebook/DiT-XL-2-512",
    "clip": "openai/clip-vit-large-patch14",
}
AUTOENCODER = ["diffusers", "AutoencoderKL"]
CLIP_TOKENIZER = ["transformers", "CLIPTokenizer"]
PIXART = {
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "Transformer2DModel"],
    "vae": AUTOENCODER,
}
XL = {
    "_diffusers_version": "0.19.0.dev0",
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": CLIP_TOKENIZER,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": AUTOENCODER,
}
INDICES = {  # name -> model_index.json
    "pixart_alpha": PIXART
    | {"_class_name": "PixArtAlphaPipeline", "_diffusers_version": "0.22.0.dev0"}
    | {"_name_or_path": "diffusers/PixArt-XL-2-512x512"},
    "pixart_sigma": PIXART | {"_class_name": "PixArtSigmaPipeline", "_diffusers_version": "0.28.0.dev0"},
    "hunyuan": {
        "_class_name": "HunyuanDiTPipeline",
        "_diffusers_version": "0.29.0.dev0",
        "feature_extractor": [None, None],
        "requires_safety_checker": True,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "BertModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "HunyuanDiT2DModel"],
        "vae": AUTOENCODER,
    },
    "sdxl": XL
    | {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    | {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": CLIP_TOKENIZER},
    "sdxl_refiner": XL
    | {"_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False}
    | {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]},
    "dit": {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.12.0.dev0",
        "id2label": {str(number): f"class {number}, kind {number}" for number in range(1000)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": AUTOENCODER,
    },
}
# name -> component -> gigabytes of its weights in float32, as the pages list them; of Hunyuan-DiT's 14.5, what is left.
GIGABYTES = {
    "pixart_alpha": {"transformer": 2.45, "text_encoder": 4.99 + 5 + 4.87 + 4.19, "vae": 0.335},
    "pixart_sigma": {"transformer": 2.44, "text_encoder": 9.99 + 9.06, "vae": 0.335},
    "hunyuan": {"transformer": 14.5 - 8.425, "text_encoder": 1.41, "text_encoder_2": 4.99 + 1.69, "vae": 0.335},
    "sdxl": {"unet": 10.3, "text_encoder": 0.492, "text_encoder_2": 2.78, "vae": 0.335},
    "sdxl_refiner": {"text_encoder_2": 2.78, "vae": 0.335},
    "dit": {"transformer": 3.0, "vae": 0.335},
}
