"""Measuring sensitivities by either probe, each piece kept in a RecordFile as it comes, so that a run goes on.

`exact` puts each weight under each method and asks the denoiser again: a record for each weight. `sketch` estimates all
shifts to first order by backward passes: a record for some directions of some images, of all weights.
"""

import time
from collections.abc import Mapping

import torch
from tqdm import tqdm

from autobuild.first_order import FirstOrder
from autobuild.sketching import Sketch, Task, shifts_of
from stages.common import at_least
from stages.units import as_time

PROBES = ("sketch", "exact")
DIRECTIONS = 32
COMPLETE = "complete"  # of the name of the sketch's last record


def add_probe_flags(parser, when):
    """The flags that say how sensitivities are measured; `when` they are."""
    parser.add_argument(
        "--probe",
        choices=PROBES,
        default=PROBES[0],
        help=f"{when}: estimate how far weights move the output by backward passes, or measure each exactly, which takes "
        f"many times as long; default {PROBES[0]}",
    )
    parser.add_argument(
        "--directions",
        type=at_least(1),
        default=DIRECTIONS,
        help=f"{when} and --probe sketch: backward passes per image and step; default {DIRECTIONS}; more are more exact",
    )


def probe_settings(args, words):
    """What sensitivities depend on by the flags of `add_probe_flags`, and the methods' words."""
    directions = {"directions": args.directions} if args.probe == "sketch" else {}
    return {"probe": args.probe, **directions, "methods": " ".join(words)}


class Measured:
    """Sensitivities of W weights under M methods, as they are in a RecordFile.

    `names` [W] are those of the weights' records of the exact probe, lists; those of the sketch's begin with `label`.
    """

    def __init__(self, records, names, label):
        self.records, self.names, self.label, self.is_sketch = records, names, label, records.settings["probe"] == "sketch"

    @property
    def is_complete(self):
        """Whether nothing is left to measure."""
        return self._shares() is not None if self.is_sketch else not self.missing()

    def missing(self):
        """Numbers of the weights that the exact probe lacks."""
        return [number for number, name in enumerate(self.names) if name not in self.records]

    def result(self):
        """(changes float64 [W, M], shifts float32 [W, M, K], shrinkage), once all is measured; see `shifts_of`."""
        if self.is_sketch:
            return shifts_of(_Tasks(self.records, self.label), self._shares())
        found = [self.records[name] for name in self.names]
        return torch.stack([each["changes"] for each in found]), torch.stack([each["shifts"] for each in found]).float(), 0.0

    def measure(self, weights, words, prober, args, title):
        """Add what is missing by asking; `weights` are Weights [W], `prober` is a Probe or a Replay."""
        with self.records:
            if not self.is_sketch:
                measure_exact(self, weights, words, prober, title)
            elif not self.is_complete:
                sketch = Sketch(list(prober.questions()), args.directions, args.seed, prober.batch_size)
                measure_sketch(self, sketch, FirstOrder(prober.denoiser, weights, words), title)

    def _shares(self):
        """Directions of each question, which the last record tells."""
        size = len(self.label)
        return next((name[-1] for name in self.records.names if name[:size] == self.label and name[size] == COMPLETE), None)


class _Tasks(Mapping):
    """{Task: tensors} of the sketch, read when they are asked for."""

    def __init__(self, records, label):
        self.records, self.label = records, label

    def __iter__(self):
        size = len(self.label)
        names = (name for name in self.records.names if name[:size] == self.label and name[size] != COMPLETE)
        return (Task(*name[size:]) for name in names)

    def __len__(self):
        return sum(1 for _ in self)

    def __getitem__(self, task):
        return self.records[[*self.label, *task]]


def measure_sketch(measured, sketch, first_order, title):
    """Add what is missing of the sketch: records of `Sketch.find`, and last the directions of each question."""
    tasks = _Tasks(measured.records, measured.label)
    total = sketch.directions * sum(question.images for question in sketch.questions)
    with tqdm(desc=title, unit="direction", total=total, initial=sum(task.size for task in tasks)) as progress:
        for number, directions, images in sketch.missing(tasks):
            for task, tensors in sketch.find(first_order, number, directions, images):
                measured.records.add([*measured.label, *task], tensors)
                progress.update(task.size)
    measured.records.add([*measured.label, COMPLETE, sketch.shares(tasks)], {})


def measure_exact(measured, weights, words, prober, title):
    """Add what is missing of the exact probe, in the order in which layers run."""
    left = measured.missing()
    if not left:
        return
    layers = [[part.layer for part in weight.parts] for weight in weights]
    prober.start_at(layers[left[0]])
    left.sort(key=lambda number: prober.prefix.place_of(layers[number]))
    total, start = len(weights), time.monotonic()
    for done, number in enumerate(tqdm(left, desc=title, unit="weight", initial=total - len(left), total=total)):
        prober.start_at(layers[number])
        measured.records.add(measured.names[number], measure_one(weights[number], words, prober))
        if done == 0:
            told = as_time((time.monotonic() - start) * (len(left) - 1))
            tqdm.write(f"{title}: at most {told} left for {len(left) - 1} weights; less with a lower --n_imgs or --calls")


def measure_one(weight, words, prober):
    """The record of a weight under the methods, in all the places where it stands.

    That is {"changes": float64 [M], "shifts": float16 [M, K]}.
    """

    def put(word):
        for part in weight.parts:
            part.set_method(word, weight.parameters.get(word, {}))

    try:
        changes, shifts = zip(*(prober.shift(put, word) for word in words), strict=True)
    finally:
        put(None)
    return {"changes": torch.tensor(changes, dtype=torch.float64), "shifts": torch.stack(shifts).half()}
