"""Successive halving (Jamieson and Talwalkar, 2016): many configurations on few images, the better ones on more.

`--budget_images 100 300` compares all configurations on their first 100 images, takes as many of the best to 300 as
cost about as much again, and the best of those to all of --n_imgs. FIDs of few images are biased, all alike, and
noisier; they decide who goes on and stand in `quant_labels_partial.jsonl`, never in `quant_cache.pkl`.
"""

import itertools
import math

from errors import InputError
from evaluation import jsonl
from stages.common import log
from stages.labeller import name_of


def check(args):
    """InputError unless --budget_images grows, from at least 2 images to less than --n_imgs."""
    schedule = [*args.budget_images, args.n_imgs]
    if any(following <= images for images, following in itertools.pairwise(schedule)):
        raise InputError(f"--budget_images {' '.join(map(str, args.budget_images))}: must grow, and stay below --n_imgs")


def survivors(labelling, args):
    """The configurations that are measured on all images: all of them, unless --budget_images says otherwise."""
    indices = list(labelling.indices)
    path = args.outdir / "quant_labels_partial.jsonl"
    lines = jsonl.load(path)
    for images, following in itertools.pairwise([*args.budget_images, args.n_imgs]):
        fids = {line["configuration"] - 1: line["FID"] for line in lines if line["images"] == images}
        for index in labelling.measured([index for index in indices if index not in fids], images):
            lines.append(label(labelling, index, images))
            fids[index] = lines[-1]["FID"]
            jsonl.save(lines, path)
        better = sorted(indices, key=lambda index: rank(fids[index]))[: max(1, len(indices) * images // following)]
        for index in set(indices) - set(better):
            labelling.parts.drop(labelling.tasks(index, images))
        log.info("%d of %d configurations go on from %d images to %d", len(better), len(indices), images, following)
        indices = sorted(better)
    return indices


def label(labelling, index, images):
    """The line of a configuration labelled on its first `images` images."""
    tasks = labelling.tasks(index, images)
    arrays = {name: array[:images] for name, array in labelling.parts.load_all(tasks).items()}
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
