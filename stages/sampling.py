"""What the stages that make images share: the flags of sampling, what they are by default, and the sampler they ask for."""

import argparse
import functools
import re
from pathlib import Path

import constants
from errors import InputError
from models import schedulers
from models.components import check_plain, one_line, refuse_quantized
from models.drawing import BatchSize, SamplingSettings
from models.embedded.captions import subject_prompts
from models.facts import native_pixels, num_classes, open_model, own_scheduler
from models.lora import open_lora
from models.pipelines import (
    OFFLOADS,
    Extras,
    defaults,
    height_width,
    is_embedded,
    load_encoder,
    load_sampler,
    model_of,
    refiner_of,
)
from models.prompt_memo import encode_prompts, remember
from quant.memory import return_free_memory
from stages import prompt_files
from stages.common import PRECISIONS, add_flag, at_least, finite, in_precision, log, multiquantizer_of

RESOLUTION_STEP = 16  # pixels: the autoencoders' 8 times the transformers' patches of 2
STEP_BAR_SECONDS = 5  # a batch that takes longer shows its steps
FAR = 1.5  # times more or fewer pixels per side than a model is made for

# What images depend on.
IMAGE_FLAGS = (
    "model_id",
    "seed",
    "n_imgs",
    "prompts_key",  # the prompts, or class numbers, themselves
    "res",
    "steps",
    "guidance",
    "scheduler",
    "negative_prompt",
    "dtype",
    "compute_dtype",
    "lora_key",  # scale and content of each --lora
    "multiquantizer_key",  # what is in the file of --multi_chkpt
)


def add_sampling_flags(parser, family, on_cpu="float32"):
    """The flags of the stages that make images; `on_cpu` says what is computed in there by default."""
    parser.add_argument(
        "--res",
        type=resolution,
        help=f"pixels per side, or HEIGHTxWIDTH; default {family.resolution}, of models but {family.model_id} their own",
    )
    add_flag(parser, family, "--steps", type=at_least(1), help="sampler steps; default the model's")
    add_flag(parser, family, "--guidance", type=finite, help="guidance scale; default the model's")
    parser.add_argument("--scheduler", choices=schedulers.CHOICES, metavar="CLASS", help=scheduler_help(family))
    parser.add_argument("--batch_size", type=at_least(1), help="images generated together; default the model's")
    parser.add_argument("--multi_chkpt", type=Path, help=f"multiquantizer; default multiquantizers/{family.name}_mq.pt")
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="none",
        help="keep weights on the host but for the model (or, slowly, the layer) that is running; for small GPUs",
    )
    parser.add_argument(
        "--compute_dtype",
        choices=list(PRECISIONS),
        help=f"what is computed in, whatever precision weights have; default the weights' own, on a CPU {on_cpu}",
    )
    parser.add_argument(
        "--vae_tiling", action="store_true", default=None, help="decode images in tiles: less memory at high resolutions"
    )
    parser.set_defaults(negative_prompt=None)
    if not family.num_classes:
        parser.add_argument("--negative_prompt", help="what images should not show")
    if any(flag == "--eta" for flag, _ in family.aliases):
        add_flag(parser, family, "--eta", type=finite, default=0.0, help="must be 0: the sampler is PLMS")
    if family.refiner:
        parser.add_argument("--refiner_id", help=f"Hub id, folder or file of the refiner; default {family.refiner.model_id}")
        parser.add_argument("--no_refiner", action="store_true", help="leave the refiner out")


def scheduler_help(family):
    own = f"{family.scheduler}, or the model's own if it needs that" if family.scheduler else "the model's own"
    return f"sampler, a class in diffusers such as {schedulers.CHOICES[0]}; default {own}"


def resolution(text):
    """Type of --res: pixels per side, or "HEIGHTxWIDTH"; squares are numbers."""
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HEIGHTxWIDTH")
    height, width = int(match[1]), int(match[2] or match[1])
    for pixels in (height, width):
        if pixels < 1 or pixels % RESOLUTION_STEP:
            raise argparse.ArgumentTypeError(f"{pixels} is not a multiple of {RESOLUTION_STEP}")
    return height if height == width else f"{height}x{width}"


def of_model(function):
    """A function of (flags, family, ...) that says in one line what it does not expect of the model's small files."""

    @functools.wraps(function)
    def told(args, *others, **named):
        with one_line(args.model_id, "configuration"):
            return function(args, *others, **named)

    return told


@of_model
def complete_sampling(args, family, guidance="guidance"):
    """Flags of sampling {name: value}, those left out filled from what is known of the model, and what they lead to.

    That is the family's row (guidance in the column named) for its own model and the embedded one; another model's native
    size, and few steps without guidance if its sampler is that of a distilled model.
    """
    family = in_precision(family, args.dtype)
    row = defaults(family, args.model_id)
    source = None if is_own(family, args.model_id) else model_of(family, args.model_id)
    few_step = args.scheduler in schedulers.FEW_STEP
    if source is not None and args.scheduler is None:
        few_step = schedulers.is_few_step(*own_scheduler(source))
    found = {
        "batch_size": args.batch_size or row.batch_size,
        "lora_key": " ".join(open_lora(each).key for each in args.lora) or None,
        "multi_chkpt": args.multi_chkpt or multiquantizer_of(args, family),
        "num_classes": _num_classes(family, row, source),
        "res": args.res or _own_resolution(family, row, source),
        **_steps_and_guidance(args, row, guidance, few_step),
    }
    if getattr(args, "eta", 0):
        raise InputError(f"--eta {args.eta}: {family.title} is sampled with PLMS, which draws no noise; leave it at 0")
    if found["steps"] < family.least_steps:
        raise InputError(f"--steps {found['steps']}: {family.title} needs at least {family.least_steps}")
    if not family.refiner:
        return found
    own_refiner = None if few_step else refiner_of(family, args.model_id)
    return found | {"refiner_id": None if args.no_refiner else args.refiner_id or own_refiner}


def is_own(family, model_id):
    """Whether the family's row, or the embedded model's, says how the model is sampled."""
    return str(model_id) == family.model_id or is_embedded(family, model_id)


def _num_classes(family, row, source):
    """Of the model that a Repository holds, of the row's if there is none; 0 if it draws prompts."""
    if not family.num_classes:
        return 0
    return row.num_classes if source is None else num_classes(family, source)


def _own_resolution(family, row, source):
    """Pixels, as --res has them, of a model for which it is left out; None if it makes no other size."""
    if family.num_classes:
        return None
    return row.resolution if source is None else resolution("x".join(map(str, native_pixels(family, source))))


def _steps_and_guidance(args, row, guidance, few_step):
    """--steps and --guidance."""
    if few_step and None in (args.steps, args.guidance):
        log.warning(
            "%s: is sampled as a few-step model: by default %d steps without guidance; see --steps and --guidance",
            args.model_id,
            schedulers.FEW_STEPS,
        )
    own = row.guidance if getattr(row, guidance) is None else getattr(row, guidance)
    own_steps, own_scale = (schedulers.FEW_STEPS, schedulers.NO_GUIDANCE) if few_step else (row.steps, own)
    return {"steps": args.steps or own_steps, "guidance": own_scale if args.guidance is None else args.guidance}


@of_model
def check_sampling(args, family, device, packed=False):
    """InputError if a flag is not for this model, as its small files tell, or not for the device; or the model is quantized
    already, unless it may be `packed` by this program.
    """
    if args.offload != "none" and device.type == "cpu":
        raise InputError(f"--offload {args.offload}: is for GPUs, whose memory it saves; leave it out on the CPU")
    source = model_of(family, args.model_id)
    (check_plain if packed else refuse_quantized)(source, family.denoiser)
    native = native_pixels(family, source)
    if family.num_classes and args.res is not None and height_width(args.res) != native:
        raise InputError(f"--res {args.res}: {args.model_id} makes images of {native[0]} px only")
    if getattr(args, "refiner_id", None):
        _check_refiner(args, family)
    longest = own_scheduler(source)[1].get("num_train_timesteps", 1000)
    if args.steps > longest:
        raise InputError(f"--steps {args.steps}: {args.model_id} has {longest} noise levels to step through")
    if args.res is not None and not _published(args, family) and _is_far(height_width(args.res), native):
        log.warning(
            "--res %s: %s is made for %dx%d px; images of another size may be poor", args.res, args.model_id, *native
        )


def _check_refiner(args, family):
    try:
        open_model(family, args.refiner_id, family.refiner.pipeline)
    except InputError as reason:
        raise InputError(
            f"the refiner: {reason}; name another with --refiner_id, or leave it out with --no_refiner"
        ) from None


def _published(args, family):
    return is_own(family, args.model_id) and args.res == defaults(family, args.model_id).resolution


def _is_far(size, native):
    ratios = [ours / theirs for ours, theirs in zip(size, native, strict=True)]
    area = (ratios[0] * ratios[1]) ** 0.5
    return not 1 / FAR <= area <= FAR


def prompts_for(args, family):
    """`n_imgs` prompts, or class numbers for a family that has no prompts."""
    if family.num_classes:
        return [index % args.num_classes for index in range(args.n_imgs)]
    if args.prompts is None and is_embedded(family, args.model_id):
        return [caption for _, caption in subject_prompts(args.n_imgs)]
    return prompt_files.load(args.prompts or Path(constants.COCO_2017_PROMPTS), args.n_imgs)


def settings_of(args, hand_over=None):
    """The SamplingSettings that the flags ask for; `hand_over` is the share of the steps to take, before a refiner's."""
    return SamplingSettings(
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        res=args.res,
        batch_size=BatchSize(args.batch_size),
        published_noise=getattr(args, "published_noise", False),
        hand_over=hand_over,
    )


def extras_of(args):
    """What the flags say of a model beyond its name."""
    return Extras(
        refiner_id=getattr(args, "refiner_id", None),
        loras=tuple(open_lora(each) for each in args.lora),
        scheduler=args.scheduler,
        negative_prompt=args.negative_prompt,
        vae_tiling=bool(args.vae_tiling),
        offload=args.offload,
        compute_dtype=PRECISIONS.get(args.compute_dtype),
    )


def load_for(args, family, device, prompts=None, place=True):
    """The sampler that `check_sampling` has found to be possible: it can draw `prompts`, its text encoders are released.

    Without `prompts` it has its text encoders.
    """
    if prompts is None or family.num_classes:
        return load_sampler(family, args.model_id, device, extras_of(args), place=place)
    return load_encoded(args, family, device, encode_for(args, family, device, prompts), place)


def load_encoded(args, family, device, embeddings, place=True):
    """The sampler that the flags ask for, without text encoders: it draws the prompts whose embeddings are given."""
    sampler = load_sampler(family, args.model_id, device, extras_of(args), text_encoders=False, place=place)
    remember(sampler, embeddings)
    return sampler


def show_steps(sampler):
    """A bar of steps below that of images, where a batch takes long."""
    for pipeline in sampler.pipelines:
        pipeline.set_progress_bar_config(desc="steps", unit="step", leave=False, delay=STEP_BAR_SECONDS)


def encode_for(args, family, device, prompts):
    """The prompts' embeddings, by text encoders that are loaded for nothing else."""
    encoder = load_encoder(family, args.model_id, device, extras_of(args))
    embeddings = encode_prompts(encoder, prompts, args.guidance, args.res)
    del encoder
    return_free_memory()
    return embeddings
