"""Calibration in the stages that quantize: what a denoiser's layers are fed with, and rounding that knows it.

The pipeline draws a few images of prompts and noise that no other image is drawn of: in full precision, and again under
the nearest levels. Inputs of both are averaged, for a quantized denoiser leaves the way of the float one, and rounding
that knows only that way errs more on its own (see quant/calibrated.py). What was heard is kept as it comes.
"""

import itertools
from pathlib import Path

from errors import InputError
from models.embedded.captions import NUM_SUBJECTS, subject_prompts
from quant.calibration import Averaged, collect
from stages import prompt_files
from stages.common import at_least
from stages.flags import Flags

IMAGES = 32
SEED_OFFSET = 2**31  # from the seed of the images that are drawn, to that of those for calibration
SUBJECTS = (
    "an old fisherman mending a net",
    "a red tram at a crossing",
    "two horses in the rain",
    "a bowl of figs and walnuts",
    "a lighthouse in a storm",
    "a child with a paper kite",
    "a market stall full of spices",
    "an astronaut in a greenhouse",
    "a narrow street with laundry lines",
    "a heron standing in shallow water",
    "a glass chess set",
    "a snowy village under stars",
    "a robot watering flowers",
    "a woman reading in a train",
    "a mountain lake with a wooden boat",
    "a cat on a stack of books",
)
STYLES = ("a photo of {}", "an oil painting of {}", "a detailed pencil drawing of {}", "{}, flat poster, bold colors")


def add_calibration_flags(parser, default_help):
    """--calibrate and how much of it."""
    parser.add_argument(
        "--calibrate",
        action="store_true",
        default=None,
        help="fit and round weights by what their layers are fed with: images closer to full precision at the same size, "
        f"for the time of a few more; {default_help}",
    )
    parser.add_argument("--no-calibrate", dest="calibrate", action="store_const", const=None, help="round to nearest levels")
    parser.add_argument(
        "--calibration_images", type=at_least(1), help=f"with --calibrate: images to listen to; default {IMAGES}"
    )
    parser.add_argument(
        "--calibration_prompts",
        type=Path,
        metavar="FILE",
        help="with --calibrate: prompts of theirs, in any form that prompts are read in; default sentences of its own",
    )


def check_calibration_flags(args):
    """InputError for flags that say how to calibrate where nothing is calibrated."""
    for name in ("calibration_images", "calibration_prompts"):
        if args[name] is not None and not args.calibrate:
            raise InputError(f"--{name}: is for --calibrate; give that too")


def without_calibration(flags):
    """The flags {name: value} of a run without those of calibration where it has none: they are those of always."""
    return flags if flags.calibrate else Flags({name: flags[name] for name in flags if "calibrat" not in name})


def image_count(args):
    """How many images are listened to."""
    return args.calibration_images or IMAGES


def calibration_prompts(args):
    """A prompt for each image: of the file that the flags name, or sentences, each of a subject and a style."""
    count = image_count(args)
    if args.calibration_prompts is not None:
        return prompt_files.load(args.calibration_prompts, count)
    pairs = [style.format(subject) for style, subject in itertools.product(STYLES, SUBJECTS)]
    return [pairs[number % len(pairs)] for number in range(count)]


def captions(args):
    """A caption of the embedded models' for each image: those that no other images are first drawn of."""
    return [caption for _, caption in reversed(subject_prompts(NUM_SUBJECTS))][: image_count(args)]


def calibrate(model, configuration, calls, folder, settings):
    """The QuantizedModel whose methods of a configuration are calibrated.

    `calls` are functions that each draw images by its denoiser, in a precision that computes on its device; `settings`
    tell what they draw. What is heard is kept in `folder`: a run that was cut off goes on.
    """
    model.restore()
    plain = collect(model.module, model.slots, calls, folder / "full_precision", settings, show=True)
    model.apply(configuration)
    own_way = collect(model.module, model.slots, calls, folder / "quantized", settings, show=True)
    model.restore()
    return model.calibrate(Averaged(plain, own_way), configuration)
