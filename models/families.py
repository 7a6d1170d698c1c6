"""One row per family: everything that tells one denoiser from another.

Sources: the models' pages and config files on the Hub, the published scripts of Mills et al. (2025)
for samplers, resolutions and splits. Where a stage needs to treat two families differently, the
difference is a column here.
"""

from dataclasses import dataclass

import torch

from models.compvis import compvis_names
from models.splits import half, hidden_channels
from quant.slots import ANY_MODULE, SlotRules


@dataclass(frozen=True)
class Embedded:
    """What differs for the small trained pipeline in `models/embedded/<family>`, run by `--model_id embedded`."""

    guidance: float  # shows the best pictures
    label_guidance: float  # orders quantizers by FID
    steps: int = 20
    resolution: int = 64
    batch_size: int = 50
    prompt: str = "a red seven on a blue background"
    num_classes: int = 10
    class_ids: tuple[int, ...] = tuple(range(10))
    q_config: str = "uniform:mse-4"
    scheduler_config: tuple[tuple[str, object], ...] = ()  # of the class `Family.scheduler`


@dataclass(frozen=True)
class Refiner:
    """A second pipeline, never quantized, that takes over the last denoising steps."""

    name: str  # folder in models/embedded
    pipeline: str
    model_id: str
    hand_over: float  # share of the steps before it


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    pipeline: str  # class in diffusers
    model_id: str  # on the Hub, or a single file
    denoiser: str  # attribute of the pipeline
    embedded: Embedded
    steps: int
    guidance: float
    q_config: str  # default of --q_config
    licence: str
    # Weights: published numbers of quantizable weights, weight layers and configuration keys.
    fp_weights: int
    num_layers: int
    num_keys: int
    slot_rules: SlotRules = ANY_MODULE  # which weights are quantized
    # Pipeline.
    dtype: torch.dtype = torch.float16  # precision P of the weights
    variant: str | None = None  # of the weight files on the Hub
    in_one_file: bool = False  # whether diffusers reads the pipeline from a single checkpoint file, too
    scheduler: str | None = None  # class in diffusers that replaces the pipeline's own
    scheduler_config: tuple[tuple[str, object], ...] = ()  # its published settings, beside what the model was trained with
    call: tuple[tuple[str, object], ...] = ()  # more arguments of the pipeline's call
    least_steps: int = 1  # that its pipeline in diffusers can sample with
    refiner: Refiner | None = None
    # Images and labels. A family has prompts or, if num_classes is not 0, classes.
    resolution: int = 512  # published pixels per side, of inference and of the BOPs
    label_guidance: float | None = None  # None: the same as guidance
    batch_size: int = 4  # images generated together, by default
    prompt: str = "a lion riding a bike in Paris"
    num_classes: int = 0
    class_ids: tuple[int, ...] = ()  # default of --cls_id
    reference_images: str = "COCO_2017_IMAGES"  # name in constants.py of the folder FID compares with
    # Command line.
    aliases: tuple[tuple[str, str], ...] = ()  # (flag, another name for it)
    prefixes: tuple[str, ...] = ()  # of module paths, that --prefix may fit by themselves

    @property
    def precision_bits(self):
        return torch.finfo(self.dtype).bits

    @property
    def quantization(self):
        """Arguments of quant's `QuantizedModel` beside the denoiser."""
        return {"dtype": self.dtype, "rules": self.slot_rules, "name": self.name}


PUBLISHED_CONFIGS = "https://github.com/Ascend-Research/Qua2SeDiMo"  # the paper's repository
NO_BINNING = ("use_resolution_binning", False)  # images of just the size asked for
AS_WRITTEN = ("clean_caption", False)  # cleaning captions needs packages that rewrite no plain prompt
# PNDM without its Runge-Kutta steps is PLMS (Liu et al., 2022), as CompVis' program samples.
PLMS = (("skip_prk_steps", True), ("set_alpha_to_one", False), ("steps_offset", 1), ("timestep_spacing", "leading"))

FAMILIES = {
    row.name: row
    for row in [
        Family(
            name="pixart_alpha",
            title="PixArt-alpha",
            pipeline="PixArtAlphaPipeline",
            model_id="PixArt-alpha/PixArt-XL-2-512x512",
            denoiser="transformer",
            licence="OpenRAIL++",
            steps=20,
            guidance=4.5,
            call=(NO_BINNING, AS_WRITTEN),
            least_steps=2,  # a single one is taken for a distilled model
            q_config="quant_configs/alpha_40.pkl",
            fp_weights=610_228_224,
            num_layers=287,
            num_keys=287,
            embedded=Embedded(guidance=4.0, label_guidance=2.0),
        ),
        Family(
            name="pixart_sigma",
            title="PixArt-Sigma",
            pipeline="PixArtSigmaPipeline",
            model_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            denoiser="transformer",
            licence="OpenRAIL++",
            resolution=1024,
            steps=20,
            guidance=4.5,
            call=(NO_BINNING, AS_WRITTEN),
            q_config="quant_configs/sigma_39.pkl",
            fp_weights=610_228_224,
            num_layers=287,
            num_keys=287,
            embedded=Embedded(guidance=4.0, label_guidance=2.0),
        ),
        Family(
            name="hunyuan",
            title="Hunyuan-DiT",
            pipeline="HunyuanDiTPipeline",
            model_id="Tencent-Hunyuan/HunyuanDiT-Diffusers",
            denoiser="transformer",
            licence="Tencent Hunyuan Community",
            resolution=1024,
            steps=50,
            guidance=5.0,
            call=(NO_BINNING,),
            q_config="quant_configs/hunyuan_40.pkl",
            slot_rules=SlotRules(
                splits=((r"blocks\.\d+\.skip_linear", half),),
                exclude=(r"time_extra_emb\.pooler\.[qkvc]_proj",),  # read by their attention, never called
            ),
            fp_weights=1_499_645_952,
            num_layers=472,
            num_keys=487,
            embedded=Embedded(guidance=4.0, label_guidance=1.5),
        ),
        Family(
            name="sdxl",
            title="Stable Diffusion XL",
            pipeline="StableDiffusionXLPipeline",
            model_id="stabilityai/stable-diffusion-xl-base-1.0",
            variant="fp16",
            in_one_file=True,
            denoiser="unet",
            licence="OpenRAIL++",
            steps=40,
            guidance=5.0,
            refiner=Refiner(
                name="sdxl_refiner",
                pipeline="StableDiffusionXLImg2ImgPipeline",
                model_id="stabilityai/stable-diffusion-xl-refiner-1.0",
                hand_over=0.8,
            ),
            q_config="quant_configs/sdxl_37.pkl",
            slot_rules=SlotRules(splits=((r"up_blocks\.\d+\.resnets\.\d+\.conv1", hidden_channels),)),
            fp_weights=2_565_880_320,
            num_layers=794,
            num_keys=803,
            prefixes=("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"),
            embedded=Embedded(guidance=4.0, label_guidance=2.0),
        ),
        Family(
            name="sdv15",
            title="Stable Diffusion 1.5",
            pipeline="StableDiffusionPipeline",
            model_id="models/ldm/stable-diffusion-v1/v1-5-pruned-emaonly.ckpt",
            denoiser="unet",
            licence="CreativeML OpenRAIL-M",
            dtype=torch.float32,
            in_one_file=True,
            scheduler="PNDMScheduler",
            scheduler_config=PLMS,
            steps=50,
            guidance=7.5,
            q_config="quant_configs/sdv15_40.pkl",
            slot_rules=SlotRules(
                splits=((r"up_blocks\.\d+\.resnets\.\d+\.conv_shortcut", hidden_channels),), file_names=compvis_names
            ),
            fp_weights=859_077_120,
            num_layers=282,
            num_keys=294,
            aliases=(
                ("--model_id", "--ckpt"),
                ("--steps", "--ddim_steps"),
                ("--guidance", "--scale"),
                ("--eta", "--ddim_eta"),
            ),
            embedded=Embedded(guidance=3.0, label_guidance=2.0, scheduler_config=PLMS),
        ),
        Family(
            name="dit",
            title="DiT-XL/2",
            pipeline="DiTPipeline",
            model_id="facebook/DiT-XL-2-512",
            denoiser="transformer",
            licence="CC-BY-NC 4.0",
            scheduler="DPMSolverMultistepScheduler",
            scheduler_config=(("timestep_spacing", "linspace"),),
            steps=250,
            guidance=4.0,
            num_classes=1000,
            class_ids=(833,),
            reference_images="IMAGENET_VAL_IMAGES",
            q_config="quant_configs/dit_40.pkl",
            slot_rules=SlotRules(
                ties=(
                    (
                        r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.(\w+)",
                        r"transformer_blocks.0.norm1.emb.timestep_embedder.\1",
                    ),
                ),
            ),
            fp_weights=716_986_368,
            num_layers=255,
            num_keys=255,
            embedded=Embedded(guidance=4.0, label_guidance=2.0, scheduler_config=(("timestep_spacing", "leading"),)),
        ),
    ]
}
