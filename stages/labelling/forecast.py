"""What a run is going to take, said before it is too late: its time once the first images tell, its disk beforehand."""

import shutil
import time

import torch

from errors import InputError
from models import geometry
from models.facts import native_pixels
from models.pipelines import compute_dtype, height_width, is_embedded, model_of
from stages.common import PRECISIONS, log
from stages.labelling import successive_halving
from stages.units import as_size, as_time

INCEPTION_FEATURES, DIGIT_FEATURES = 2048, 64  # of an image
PNG_SHARE = 0.5  # of its raw pixels that an image's file takes, about


class Forecast:
    """Says what is left of a labelling run: after its first images, and again after its first configuration."""

    def __init__(self, args, configurations, at_once):
        self.args, self.configurations, self.at_once = args, configurations, at_once
        self.told = set()

    def begin(self, images):
        """A part of the run begins; `images` are to be drawn until all is done."""
        self.images, self.drawn, self.since = images, 0, time.monotonic()

    def add(self, images):
        """So many more are drawn. The first come when each of the workers is about to have as many."""
        self.drawn += images
        self.tell("images", self.at_once)

    def tell(self, after, shares=1):
        """Log what is left, once after each."""
        if after in self.told or not 0 < self.drawn < self.images:
            return
        self.told.add(after)
        left = (time.monotonic() - self.since) / (shares * self.drawn) * (self.images - self.drawn)
        log.info(
            "about %s left until %d configurations are labelled, on %s%d images each; it takes less with %s",
            *(as_time(left), self.configurations, "up to " if self.args.budget_images else "", self.args.n_imgs),
            ", ".join(self.savings()),
        )

    def savings(self):
        """Flags that make a run shorter."""
        args = self.args
        yield "fewer --q_config" if args.q_config else "a lower --num_archs"
        yield "a lower --n_imgs"
        if not args.budget_images and args.n_imgs >= 20:
            yield f"--budget_images {args.n_imgs // 10} {3 * args.n_imgs // 10}"
        if args.workers is None and args.ray_address is None:
            yield "--workers, one a GPU"


def check_disk(args, family, device):
    """Log the disk that a labelling run is about to fill at most; InputError if that much is not free."""
    parts = {name: size for name, size in disk_bytes(args, family, device).items() if size}
    needed, free = sum(parts.values()), shutil.disk_usage(args.outdir).free
    what = ", ".join(f"{as_size(size)} {name}" for name, size in parts.items())
    if needed > free:
        raise InputError(
            f"{args.outdir}: the run needs about {as_size(needed)} of disk ({what}), and {as_size(free)} are free; give "
            "an --outdir on another disk, a lower --n_imgs" + (", or leave out --keep_samples" if args.keep_samples else "")
        )
    log.info("disk: about %s at most (%s), %s are free", as_size(needed), what or "all is there", as_size(free))


def disk_bytes(args, family, device):
    """{what: bytes} that a run still has to write below --outdir, reckoned from shapes."""
    height, width = height_width(args.res) if args.res else native_pixels(family, model_of(family, args.model_id))
    features = DIGIT_FEATURES if is_embedded(family, args.model_id) else INCEPTION_FEATURES
    judged = 4 * features + 8 * 8  # of an image: its features, and numbers
    image, latents = 3 * height * width, 4 * 4 * (height // 8) * (width // 8)
    there = {path.name for path in args.outdir.iterdir()} if args.outdir.is_dir() else set()
    samples = (args.num_archs + 1) * args.n_imgs * image * PNG_SHARE if args.keep_samples else 0
    return {
        "prompt embeddings": 0 if "prompt_embeddings.pt" in there else prompt_bytes(args, family, device),
        # Its parts, and all of them in one.
        "full precision": 0 if "full_precision.json" in there else 2 * args.n_imgs * (image + latents + judged),
        "configurations in work": judged * most_images(args),
        "samples": max(0, samples - bytes_below(args.outdir / "samples")),
    }


def most_images(args):
    """Images of configurations that are measured and not yet in a row, at most."""
    if not args.budget_images:
        return 2 * (args.workers or 1) * args.n_imgs
    return max(count * images for count, images in successive_halving.stages(args, args.num_archs))


def prompt_bytes(args, family, device):
    """Of the embeddings of --n_imgs prompts as the family's text encoders have them; an embedded model's are nothing."""
    if family.num_classes or is_embedded(family, args.model_id):
        return 0
    with torch.device("meta"):
        inputs = geometry.example_inputs(family.name, geometry.build(family.name))
    inputs |= inputs.get("added_cond_kwargs", {})
    numbers = sum(value.numel() for name, value in inputs.items() if "text" in name or "encoder" in name)
    refined = 2 if getattr(args, "refiner_id", None) else 1
    return refined * args.n_imgs * numbers * compute_dtype(family, device, PRECISIONS.get(args.compute_dtype)).itemsize


def bytes_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.png")) if folder.is_dir() else 0
