"""Successive halving (Jamieson and Talwalkar, 2016): many configurations on few images, the better ones on more.

`--budget_images 100 300` compares all configurations on their first 100 images, takes as many of the best to 300 as
cost about as much again, and the best of those to all of --n_imgs. FIDs of few images are biased, all alike, and
noisier; they decide who goes on and stand in `quant_labels_partial.jsonl`, never in `quant_cache.pkl`.
"""

import itertools
import math

from errors import InputError
from stages.common import log
from stages.labelling import json_lines
from stages.labelling.labeller import name_of


def check(args):
    """InputError unless --budget_images grows, from at least 2 images to less than --n_imgs."""
    schedule = [*args.budget_images, args.n_imgs]
    if any(following <= images for images, following in itertools.pairwise(schedule)):
        raise InputError(f"--budget_images {' '.join(map(str, args.budget_images))}: must grow, and stay below --n_imgs")


def stages(args, count):
    """[(configurations, images that they are measured on)] of `count` configurations, one pair after another."""
    schedule = [*args.budget_images, args.n_imgs]
    pairs = [(count, schedule[0])]
    for images, following in itertools.pairwise(schedule):
        pairs.append((max(1, pairs[-1][0] * images // following), following))
    return pairs


def images_from(stage, args, count):
    """Images that are drawn in the stage number `stage` of `stages` and all after it."""
    drawn = [0, *args.budget_images]
    numbers = [number * (images - before) for (number, images), before in zip(stages(args, count), drawn, strict=True)]
    return sum(numbers[stage:])


def survivors(labelling, args):
    """The configurations that are measured on all images: all of them, unless --budget_images says otherwise."""
    indices = list(labelling.indices)
    path = args.outdir / "quant_labels_partial.jsonl"
    lines = [line for line in json_lines.load(path, "configuration", "images") if "FID" in line]
    for stage, (images, following) in enumerate(itertools.pairwise([*args.budget_images, args.n_imgs]), start=1):
        fids = {line["configuration"] - 1: line["FID"] for line in lines if line["images"] == images}
        later = images_from(stage, args, len(labelling.indices))
        for index in labelling.measured([index for index in indices if index not in fids], images, later):
            lines.append(label(labelling, index, images))
            fids[index] = lines[-1]["FID"]
            json_lines.save(lines, path)
        going_on = stages(args, len(labelling.indices))[stage][0]
        better = sorted(indices, key=lambda index: rank(fids[index]))[:going_on]
        for index in set(indices) - set(better):
            labelling.results.drop(labelling.tasks(index, images))
        log.info("%d of %d configurations go on from %d images to %d", len(better), len(indices), images, following)
        indices = sorted(better)
    return indices


def label(labelling, index, images):
    """The line of a configuration labelled on its first `images` images."""
    tasks = labelling.tasks(index, images)
    arrays = {name: array[:images] for name, array in labelling.results.load_all(tasks).items()}
    labels = labelling.labels(name_of(index), arrays)
    row = labelling.planned[index]
    return {
        "configuration": index + 1,
        "avg_bits": row["avg_bits"],
        "FID": labels.pop("FID-GT-1k"),
        **labels,
        **labelling.proxies(arrays),
    }


def rank(fid):
    """Sorts what is not a number last; read from disk it is None."""
    return math.inf if fid is None or math.isnan(fid) else fid
