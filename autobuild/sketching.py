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
TOGETHER = 16  # directions of one record, for which activations are computed once
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

    The first of them are `leading`: of each question [L, N, ...], see `leading_directions`. The others are random and at
    right angles to those, for what is left of shifts beside them.

    Tensors of a record: "products" float32 [W, M, N, K] of a task's N images and K directions, and "squares" float64 [N],
    squared norms of the guided outputs.
    """

    def __init__(self, questions, directions, seed, batch_size, leading=None):
        self.questions, self.seed, self.batch_size, self.leading = questions, seed, batch_size, leading
        self.first = 0 if leading is None else len(leading[0])  # the first random one
        self.directions = directions - self.first
        self.tried = min(TRIED, self.directions)

    def missing(self, records):
        """Yield (question, directions, images), ranges but the first, for what no record tells; in a fixed order.

        `records` {Task: tensors} are looked at again once the directions that are tried first are all there.
        """
        everywhere = range(len(self.questions))
        for directions in ((0, self.first), (self.first, self.first + self.tried)):
            if directions[0] < directions[1]:
                yield from self._left(records, dict.fromkeys(everywhere, directions))
        shares = self.shares(records)
        for before in range(self.tried, max(shares), TOGETHER):
            some = {number: min(before + TOGETHER, count) for number, count in enumerate(shares) if count > before}
            yield from self._left(records, {n: (self.first + before, self.first + last) for n, last in some.items()})

    def _left(self, records, wanted):
        known = defaultdict(set)
        for task in records:
            known[task[:3]] |= set(range(*task[3:]))
        for number, directions in wanted.items():
            images = sorted(set(range(self.questions[number].images)) - known[(number, *directions)])
            for some in np.split(images, np.flatnonzero(np.diff(images) != 1) + 1) if images else ():
                yield number, range(*directions), range(int(some[0]), int(some[-1]) + 1)

    def shares(self, records):
        """Random directions of each question, by the squared norms of shifts in those that were tried."""
        squares, images = defaultdict(float), defaultdict(int)
        for task in sorted(records):
            if task.first_direction == self.first:
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
            if directions.start < self.first:
                products /= math.prod(question.shape) ** 0.5
            squares = guided.double().flatten(1).square().sum(dim=1)
            return Task(number, directions.start, directions.stop, some.start, some.stop), products, squares

        for task, products, squares in in_batches(make, images, self.batch_size):
            yield task, {"products": products.float(), "squares": squares}

    def _direction(self, number, direction, images):
        """One direction [N, ...] of some images: a leading one, as long as random signs, or random signs' rest."""
        question, size = self.questions[number], math.prod(self.questions[number].shape)
        if direction < self.first:
            return self.leading[number][direction, images.start : images.stop] * size**0.5
        seeds = self.seed, question.step
        signs = [random_signs(question.shape, direction - self.first, *seeds, question.first + image) for image in images]
        signs = torch.stack(signs).float()
        if not self.first:
            return signs
        leading = self.leading[number][:, images.start : images.stop].flatten(2)  # [L, N, D]
        along = torch.einsum("lnd,nd->ln", leading, signs.flatten(1))
        return signs - torch.einsum("ln,lnd->nd", along, leading).view_as(signs)


@torch.no_grad()
def leading_directions(questions, disturb, count, batch_size):
    """Directions in which the guided outputs shift most: of each question [count, N, ...], at right angles, of norm 1.

    They span the shifts by `count` disturbances of all weights at once, `disturb(number)`; `disturb(None)` undoes them.
    Products along few such directions are most of what there is where shifts of different weights are alike.
    (Meyer et al., 2021, Hutch++.)
    """

    def answers():
        return [torch.cat(list(in_batches(each.ask, range(each.images), batch_size))).cpu() for each in questions]

    before, shifts = answers(), []
    for number in range(count):
        disturb(number)
        try:
            shifts.append([now - then for now, then in zip(answers(), before, strict=True)])
        finally:
            disturb(None)
    found = []
    for each in zip(*shifts, strict=True):
        each = torch.stack(each, dim=-1).double()  # [N, ..., L]
        basis = torch.linalg.qr(each.flatten(1, -2))[0]
        found.append(basis.movedim(-1, 0).reshape(count, *each.shape[:-1]).float())
    return found


def shifts_of(records, leading, shares):
    """(squared norms [W, M], numbers [W, M, K] whose inner products estimate those of the shifts, shrinkage).

    Of the records of all tasks of questions that have as many `leading` directions, and `shares` [Q] random ones. Shifts are
    in units of the norm of the guided outputs. The shrinkage is what share of the inner products of different weights'
    shifts is taken for noise.
    """
    tasks = sorted(records)
    norm = sum(float(records[task]["squares"].sum()) for task in tasks if task.first_direction == 0) or 1.0
    numbers, energies, counts = [], [], []
    for task in tasks:
        is_random = task.first_direction >= leading
        count = shares[task.question] if is_random else 1
        products = records[task]["products"].double() / (norm * count) ** 0.5
        numbers.append(products.flatten(2))
        if task.first_direction == leading:
            energies.append(products.square().sum(dim=(0, 1, 3)) * count / products.shape[-1])
            counts.append(torch.full_like(energies[-1], count))
    numbers, energies = torch.cat(numbers, dim=-1), torch.cat(energies)
    squares = numbers.square().sum(dim=-1)
    noise = float((energies.square() / torch.cat(counts)).sum() / squares.sum().square().clamp(min=1e-300))
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
