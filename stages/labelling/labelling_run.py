"""A labelling run: what is measured already, what is left, and the rows that come of it.

Workers measure tasks; this process alone writes. Each task's result goes to `<outdir>/parts`, so that a run cut off
at any point goes on without measuring anything twice; a configuration whose tasks are all done becomes a row of
`quant_cache.pkl`, in the order of the configurations, and a line of `quant_proxies.jsonl`.
"""

import collections
import json
import math
import time

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from errors import InputError
from evaluation import fid, quant_cache
from evaluation.constant_images import say_constant
from evaluation.proxies import PER_IMAGE
from quant.checked_files import with_digest
from quant.files import save_png, save_text
from stages.common import log
from stages.labelling import full_precision, json_lines, label_runs, successive_halving
from stages.labelling.forecast import Forecast
from stages.labelling.labeller import Task, name_of
from stages.labelling.task_results import TaskResults

TASK_BATCHES = 4  # in a task: few enough to lose little, enough that images are judged while others are made


class LabellingRun:
    """A run in the folder --outdir."""

    def __init__(self, job, workers, reference, watch):
        self.args, self.workers, self.reference, self.watch = job.args, workers, reference, watch
        self.outdir = job.args.outdir
        self.results = TaskResults(self.outdir / "parts")
        self.full_precision = None
        self.task_images = TASK_BATCHES * self.args.batch_size  # stays when batches are halved
        self.cache_path, self.proxies_path = self.outdir / "quant_cache.pkl", self.outdir / "quant_proxies.jsonl"
        self.rows = quant_cache.load(self.cache_path)
        self.indices = range(max(self.args.num_archs, len(self.rows)))
        self.forecast = Forecast(self.args, len(self.indices), workers.count)
        self.planned = dict(zip((None, *self.indices), workers.describe([None, *self.indices]), strict=True))

    def tasks(self, index, images):
        """The tasks that measure the first `images` images of a configuration, and at times some more."""
        firsts = range(0, images, self.task_images)
        return [Task(index, first, min(first + self.task_images, self.args.n_imgs)) for first in firsts]

    def measured(self, indices, images, later=0):
        """Yield each of the configurations, in their order, once its first `images` images are measured.

        `later` is how many images the run is going to draw after these, of what it says of its time.
        """
        wanted = {index: self.tasks(index, images) for index in indices}
        left = {index: [task for task in each if self.results.load(task) is None] for index, each in wanted.items()}
        tasks = [task for each in left.values() for task in each]
        waiting = collections.deque(indices)

        def complete():
            while waiting and not left[waiting[0]]:
                yield waiting.popleft()

        total = sum(task.count for each in wanted.values() for task in each)
        done = total - sum(task.count for task in tasks)
        title = "full precision" if None in left else f"{len(left)} configurations"
        self.forecast.begin(total - done + later)
        with logging_redirect_tqdm([log]), tqdm(total=total, initial=done, desc=title, unit="img") as progress:

            def drawn(count):
                progress.update(count)
                self.forecast.add(count)

            yield from complete()
            for task, arrays, seconds in self.workers.run(tasks, self.full_precision, drawn):
                self.watch.add(seconds)
                self.keep(task, arrays)
                left[task.index].remove(task)
                if task.index is not None and not left[task.index]:
                    self.forecast.tell("configuration")
                yield from complete()

    def keep(self, task, arrays):
        """Put a task's result on disk; its images beside the others of --keep_samples."""
        with self.watch.phase("write"):
            if self.args.keep_samples:
                self.keep_samples(task, arrays["images"], np.isnan(arrays["features"]).any(axis=1))
            if task.index is not None:
                arrays.pop("images", None)
            self.results.save(task, arrays)

    def keep_samples(self, task, images, broken):
        folder = self.outdir / "samples" / task.name
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images, start=task.first):
            if not broken[index - task.first]:
                save_png(image, folder / f"{index:05d}.png")

    def measure_full_precision(self):
        """Full precision's row without its configuration; both it and its images are measured once and kept."""
        self.full_precision = full_precision.load(self.outdir / "full_precision", self.args.n_imgs)
        if self.full_precision is not None:
            row = label_runs.full_precision_row(self.outdir)
            if row is not None:
                self.check_reference(row["FID-GT-1k"])
                return row
        self.full_precision = None  # measured without one
        later = successive_halving.images_from(0, self.args, len(self.indices)) - len(self.rows) * self.args.n_imgs
        for _ in self.measured([None], self.args.n_imgs, max(0, later)):
            arrays = self.results.load_all(self.tasks(None, self.args.n_imgs))
        row = self.planned[None] | self.labels("full_precision", arrays)
        if math.isnan(row["FID-GT-1k"]):
            raise InputError(
                "full precision draws images that have values that are not numbers, so there is nothing to compare with; "
                "try other flags, or --device cpu, which computes in float32"
            )
        del row["config"]
        with self.watch.phase("write"):
            full_precision.save(self.outdir / "full_precision", arrays)
            save_text(json.dumps(with_digest(row), indent=1), self.outdir / label_runs.FULL_PRECISION)
            self.results.drop(self.tasks(None, self.args.n_imgs))
        self.full_precision = full_precision.load(self.outdir / "full_precision", self.args.n_imgs)
        return row

    def check_reference(self, before):
        """InputError unless full precision's FID is what it was: labels made with other statistics do not compare."""
        now = fid.distance(self.full_precision.features, self.reference)
        if not math.isclose(now, before, rel_tol=0.01, abs_tol=0.01):
            raise InputError(
                f"{self.outdir}: its labels were made with other statistics of the reference images (full precision's FID "
                f"was {before:.3f} and is {now:.3f}), as an earlier version read some kinds of files; give another --outdir"
            )

    def labels(self, name, arrays):
        """FID, and CLIP score if asked for, of measured images; NaN if an image is not made of numbers."""
        features = arrays["features"]
        bad = int(np.isnan(features).any(axis=1).sum())
        if bad:
            log.warning("%s: %d of %d images have values that are not numbers; its labels are NaN", name, bad, len(features))
        if "constant" in arrays:
            say_constant(name, arrays["constant"])
        with self.watch.phase("FID"):
            labels = {"FID-GT-1k": math.nan if bad else fid.distance(features, self.reference)}
        if "clip_score" in arrays:
            labels[quant_cache.CLIP_SCORE] = math.nan if bad else float(arrays["clip_score"].mean())
        return labels

    def proxies(self, arrays):
        """Means over images of their distances to full precision's."""
        features = self.full_precision.features[: len(arrays["features"])]
        per_image = {name: arrays[name] for name in PER_IMAGE}
        per_image["feature_mse"] = ((arrays["features"] - features) ** 2).mean(axis=1)
        return {"images": len(features)} | {name: float(values.mean()) for name, values in per_image.items()}

    def label(self, indices):
        """The rows of the configurations, those that are not in `quant_cache.pkl` yet measured; saved as they come."""
        self.check_rows(indices)
        proxies = [line for line in json_lines.load(self.proxies_path, "row") if line["row"] <= len(self.rows)]
        start = time.monotonic()
        for index in self.measured(indices[len(self.rows) :], self.args.n_imgs):
            tasks = self.tasks(index, self.args.n_imgs)
            arrays = self.results.load_all(tasks)
            row = self.planned[index] | self.labels(name_of(index), arrays)
            self.rows.append(row)
            proxies.append({"row": len(self.rows), "configuration": index + 1, **self.proxies(arrays)})
            with self.watch.phase("write"):
                json_lines.save(proxies, self.proxies_path)
                quant_cache.save(self.rows, self.cache_path)
                self.results.drop(tasks)
            log.info(
                "configuration %d: avg_bits %.3f, FID %.3f, %.0f s",
                *(index + 1, row["avg_bits"], row["FID-GT-1k"], time.monotonic() - start),
            )
            start = time.monotonic()
        self.results.clear()
        return self.rows

    def check_rows(self, indices):
        """The rows must be those of the first of the configurations."""
        for number, (index, row) in enumerate(zip(indices, self.rows, strict=False), start=1):
            if methods_of(row) != methods_of(self.planned[index]):
                raise InputError(
                    f"{self.cache_path}: row {number} is not configuration {index + 1} of --seed {self.args.seed}"
                )


def methods_of(row):
    return {key: value[0] for key, value in row["config"].items()}
