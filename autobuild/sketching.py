"""The sketch of all shifts: how many directions each step of each image's way takes, and what is made of the numbers.

Two directions each are tried first. Where shifts are large, inner products are uncertain; the other directions go there: the
variance of a sum over steps is least if directions are shared out in proportion to the squared norms.
"""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from autobuild.first_order import random_signs
from models.drawing import in_batches

TRIED = 2  # directions of each image at each step by which the others are shared out
TOGETHER = 64  # directions of one record, for which activations are computed once
SAMPLED = 2000  # shifts of which the mean squared cosine is taken


class Question(NamedTuple):
    """What the denoiser is asked at a step of N images."""

    images: int  # N
    first: int  # number of the first image
    step: int  # images at the same step have equally many directions
    shape: tuple  # of the guided output for an image
    rows: int  # rows of the denoiser's arguments for an image: its copies
    ask: object  # range of images -> their guided outputs [N', ...], with gradients


class Task(NamedTuple):
    """Directions of some images of a question, by numbers; its fields are a record's name."""

    question: int
    first_direction: int
    last_direction: int
    first_image: int
    last_image: int

    @property
    def size(self):
        """How many pairs of an image and a direction."""
        return (self.last_direction - self.first_direction) * (self.last_image - self.first_image)


class Sketch:
    """What is found for `questions` in about `directions` directions of each image at each step; `records` {Task: tensors}.

    Tensors of a record: "products" float32 [W, M, N, K] of a task's N images and K directions, and "squares" float64 [N],
    squared norms of the guided outputs.
    """

    def __init__(self, questions, directions, seed, batch_size):
        self.questions, self.directions, self.seed, self.batch_size = questions, directions, seed, batch_size
        self.tried = min(TRIED, self.directions)

    def missing(self, records):
        """Yield (question, directions, images), ranges but the first, for what no record tells; in a fixed order.

        `records` {Task: tensors} are looked at again once the directions that are tried first are all there.
        """
        yield from self._left(records, dict.fromkeys(range(len(self.questions)), (0, self.tried)))
        shares = self.shares(records)
        for first in range(self.tried, max(shares), TOGETHER):
            some = {number: min(first + TOGETHER, count) for number, count in enumerate(shares) if count > first}
            yield from self._left(records, {number: (first, last) for number, last in some.items()})

    def _left(self, records, wanted):
        known = defaultdict(set)
        for task in records:
            known[task[:3]] |= set(range(*task[3:]))
        for number, directions in wanted.items():
            images = sorted(set(range(self.questions[number].images)) - known[(number, *directions)])
            for some in np.split(images, np.flatnonzero(np.diff(images) != 1) + 1) if images else ():
                yield number, range(*directions), range(int(some[0]), int(some[-1]) + 1)

    def shares(self, records):
        """Directions of each question, by the squared norms of shifts in those that were tried."""
        squares, images = defaultdict(float), defaultdict(int)
        for task in sorted(records):
            if task.first_direction == 0:
                squares[self.questions[task.question].step] += float(records[task]["products"].double().square().sum())
        for question in self.questions:
            images[question.step] += question.images
        total = sum(squares.values())
        left = (self.directions - self.tried) * sum(images.values())
        counts = []
        for question in self.questions:
            share = squares[question.step] / total if total else 1 / len(images)
            most = max(math.prod(question.shape), self.tried)
            counts.append(min(self.tried + round(left * share / images[question.step]), most))
        return counts

    def find(self, first_order, number, directions, images):
        """Yield (Task, tensors) of a question's images in some directions, a batch at a time."""
        question = self.questions[number]

        def make(some):
            ask = functools.partial(question.ask, some)
            chosen = torch.stack([self._direction(number, each, some) for each in directions])
            products, guided = first_order.products(ask, question.rows * len(some), chosen)
            squares = guided.double().flatten(1).square().sum(dim=1)
            return Task(number, directions.start, directions.stop, some.start, some.stop), products, squares

        for task, products, squares in in_batches(make, images, self.batch_size):
            yield task, {"products": products.float(), "squares": squares}

    def _direction(self, number, direction, images):
        """One direction [N, ...] of some images."""
        question = self.questions[number]
        seeds = self.seed, question.step
        return torch.stack([random_signs(question.shape, direction, *seeds, question.first + image) for image in images])


def shifts_of(records, shares):
    """(squared norms [W, M], numbers [W, M, K] whose inner products estimate those of the shifts, shrinkage).

    Of the records of all tasks of questions that have `shares` [Q] directions. Shifts are in units of the norm of the guided
    outputs. The shrinkage is what share of the inner products of different weights' shifts is taken for noise.
    """
    tasks = sorted(records)
    norm = sum(float(records[task]["squares"].sum()) for task in tasks if task.first_direction == 0) or 1.0
    numbers, energies = [], defaultdict(float)  # squared norms of each image at each step
    for task in tasks:
        products = records[task]["products"].double() / (norm * shares[task.question]) ** 0.5
        numbers.append(products.flatten(2))
        for image, energy in enumerate(products.square().sum(dim=(0, 1, 3)).tolist(), start=task.first_image):
            energies[task.question, image] += energy
    numbers = torch.cat(numbers, dim=-1)
    squares = numbers.square().sum(dim=-1)
    noise = sum(energy**2 / shares[question] for (question, _), energy in energies.items())
    noise /= float(squares.sum().square().clamp(min=1e-300))
    return squares, numbers.float(), shrinkage(numbers, noise)


def shrinkage(numbers, noise):
    """What to take off inner products of different weights' shifts, for the least squared error: the share of `noise`,
    their relative variance by random directions, in their mean squared cosine. Of numbers [W, M, K].
    """
    rows = numbers[:, :: max(1, len(numbers) * numbers.shape[1] // SAMPLED)].flatten(0, 1)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    cosines = (rows @ rows.T).square()
    own = torch.eye(len(numbers), dtype=torch.bool).repeat_interleave(len(rows) // len(numbers), 0)
    own = own.repeat_interleave(len(rows) // len(numbers), 1)
    return min(1.0, noise / max(float(cosines[~own].mean()), 1e-300)) if len(numbers) > 1 else 0.0
