"""The command line of quantize.py."""

import argparse
import json
from pathlib import Path

from errors import InputError
from models.pipelines import OFFLOADS, height_width
from stages.calibrating import add_calibration_flags
from stages.common import PRECISIONS, OneLineParser, at_least, finite, seed, utf8
from stages.sampling import resolution
from stages.search_flags import ANY_METHODS, add_search_flags, checked_methods
from stages.sensitivities import add_probe_flags

DEFAULT = "uniform:kmeans-4"
DESCRIPTION = "Quantize the denoisers of any diffusers pipeline, and save it packed, for `import quant` and from_pretrained."


def pair(text):
    """Type of --call: NAME=VALUE, the value as JSON, or a plain word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def parse_args():
    parser = OneLineParser(prog="quantize.py", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--model_id", required=True, metavar="ID_OR_FOLDER", help="Hub id or folder of the pipeline")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="pipeline folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a pipeline that is at --output")
    _add_choice(parser)
    add_calibration_flags(parser, "default off: nothing but the weights is looked at")
    _add_pictures(parser)
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; default: CUDA where there is one, else the CPU")
    parser.add_argument("--dtype", choices=list(PRECISIONS), help="precision of the weights; default that of the files")
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="none",
        help="keep weights on the host but for the model (or, slowly, the layer) that is running; for small GPUs",
    )
    return parser.parse_args(complete=_complete)


def _add_choice(parser):
    """The flags that choose quantizers."""
    parser.add_argument(
        "--config",
        help=f"uniform:WORD, or a configuration's file; default {DEFAULT}, which needs one fit of each weight and no "
        "images, and has the least error of the quantizers of 4 bits",
    )
    parser.add_argument(
        "--avg_bits",
        type=finite,
        help="choose a configuration of at most so many bits per weight, parameters included, by asking the denoiser "
        "which weights are sensitive",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="modules to leave float, such as proj_out or 'transformer_blocks.*.attn'",
    )
    add_search_flags(parser, ANY_METHODS, "with --avg_bits")
    parser.add_argument("--calls", type=at_least(1), default=5, help="with --avg_bits: steps of an image's way; default 5")
    add_probe_flags(parser, "with --avg_bits")
    parser.add_argument(
        "--sensitivity", type=Path, help="with --avg_bits: file of what the denoiser said; default beside --output"
    )


def _add_pictures(parser):
    """The flags of the images before and after."""
    parser.add_argument("--prompt", type=utf8, nargs="+", help="prompt, or several in turn; or class numbers")
    parser.add_argument("--n_imgs", type=at_least(0), default=4, help="images, before and after; default 4")
    parser.add_argument("--steps", type=at_least(1), help="sampler steps; default the pipeline's")
    parser.add_argument("--res", type=resolution, help="pixels per side, or HEIGHTxWIDTH; default the pipeline's")
    parser.add_argument(
        "--call",
        type=pair,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="more arguments of the pipeline's call, such as guidance_scale=3.5 num_frames=17; a picture by its file, as in "
        "image=photo.png mask_image=mask.png",
    )
    parser.add_argument("--seed", type=seed, default=42, help="seed of everything random")
    parser.add_argument("--no_compare", action="store_true", help="leave out the full-precision images")


def _complete(args):
    """Flags {name: value}, those left out filled."""
    if args.avg_bits is not None and args.config is not None:
        raise InputError("--avg_bits and --config both say which quantizers to take; give one of them")
    idle = [name for name in ("methods", "min_bits", "fix") if getattr(args, name)] if args.avg_bits is None else ()
    if idle:
        raise InputError(f"--{idle[0]}: is for the search that --avg_bits asks for; give that, or leave it out")
    return {
        "config": args.config if args.config or args.avg_bits is not None else DEFAULT,
        "methods": checked_methods(args.methods or ANY_METHODS),
        "res": None if args.res is None else height_width(args.res),
        "sensitivity": args.sensitivity or args.output.with_name(f"{args.output.name}_sensitivity.{args.probe}"),
    }
