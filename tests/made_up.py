"""Labelling runs whose measurements are made up: for what a run does with them, and does not do twice."""

import numpy as np

FULL_PRECISION = 999  # where configurations have their number
METRICS = ("latent_mse", "image_mse", "psnr", "ssim")


class MadeUpWorkers:
    """As those of stages/labelling/workers.py are; what they measure follows from the numbers of configuration and image."""

    count = 1

    def __init__(self, last=None):
        self.measured, self.last = [], last  # the tasks, as they come; the one at which the user breaks off

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def describe(self, indices):
        rows = {"quantized_size": 4, "avg_bits": 4.0, "quantized_error": 0.5, "bops": 1.0}
        return [rows | {"config": {"model.a.weight_quantizer": [f"mse-{index}", 16, 4, 0.5]}} for index in indices]

    def run(self, tasks, full_precision, drawn):
        for task in tasks:
            if task == self.last:
                raise KeyboardInterrupt
            self.measured.append(task)
            drawn(task.count)
            yield task, make_up(task, full_precision), {}


def make_up(task, full_precision):
    """What `Labeller.measure` has of a task."""
    seed = FULL_PRECISION if task.index is None else task.index
    draws = [np.random.default_rng([seed, image]) for image in range(task.first, task.last)]
    arrays = {"features": np.stack([draw.normal(size=64) for draw in draws])}
    if full_precision is None:
        arrays["images"] = np.stack([draw.integers(0, 256, (4, 4, 3), np.uint8) for draw in draws])
        arrays["latents"] = np.stack([draw.normal(size=(4, 2, 2)).astype(np.float32) for draw in draws])
        return arrays
    return arrays | {name: np.array([draw.random() for draw in draws]) for name in METRICS}
