"""First-order shifts, against finite differences and exact shifts."""

import functools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from autobuild import sensitivity
from autobuild.first_order import FirstOrder, Weight, random_signs, saves_more_than
from autobuild.sketching import Question, Sketch, Task, shifts_of, shrinkage
from models.drawing import BatchSize, SamplingSettings
from models.families import FAMILIES
from models.pipelines import load_sampler
from quant import registry
from quant.model import QuantizedModel
from stages.sensitivities import measure_one

WORDS = ("mse-4", "mse-3", "mse-2")


class Network(nn.Module):
    """Two convolutions, one of them with circular padding, a linear layer of every pixel that is called twice, and one of
    a number for each row, whose weight another layer shares.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.second = nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="circular")
        self.pixel = nn.Linear(4, 4)
        self.level, self.same = nn.Linear(3, 4), nn.Linear(3, 4)
        self.same.weight = self.level.weight

    def forward(self, sample, level):
        hidden = self.second(torch.tanh(self.first(sample)))
        hidden += self.level(level)[:, :, None, None]
        hidden = torch.tanh(self.pixel(hidden.movedim(1, -1)))
        return self.pixel(hidden).movedim(-1, 1) * self.same(level)[:, :, None, None]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return QuantizedModel(Network().double(), splits={"second": 2}, ties={"same": "level"})


def weights_of(model):
    sharing = {}
    for key, slot in model.slots.items():
        sharing.setdefault(slot.tie, []).append(key)
    return [
        Weight([model.parts[key] for key in keys], {word: model.parameters(keys[0], word) for word in WORDS})
        for keys in sharing.values()
    ]


def guided(model, sample, level):
    """Of two copies [2, N] the second twice less the first."""
    first, second = model.module(sample, level).chunk(2)
    return 2 * second - first


def difference(weight, word, model, inputs):
    """By central differences, the derivative of the guided outputs along W' - W in all places of a weight."""
    changes = [(part, part.original.clone()) for part in weight.parts]
    layers = [part.slot.part_of(part.layer.weight.data) for part, _ in changes]
    step = 1e-4
    answers = []
    for sign in (1, -1):
        for (_, before), data in zip(changes, layers, strict=True):
            moved = registry.quantizer(word).apply(before, weight.parameters[word]) - before
            data.copy_(before + sign * step * moved)
        with torch.no_grad():
            answers.append(guided(model, *inputs))
    for (_, before), data in zip(changes, layers, strict=True):
        data.copy_(before)
    return (answers[0] - answers[1]) / (2 * step)


@pytest.mark.parametrize(("budget", "directions"), [(None, 2), (None, 200), (0, 2)])
def test_products_are_those_of_finite_differences(network, budget, directions):
    images, copies = 3, 2
    inputs = torch.randn(copies * images, 4, 6, 6).double(), torch.randn(copies * images, 3).double()
    weights = weights_of(network)
    assert [len(weight.parts) for weight in weights] == [1, 1, 1, 1, 2]
    first_order = FirstOrder(network.module, weights, WORDS, budget)
    signs = torch.randint(2, (directions, images, 4, 3, 3)) * 2 - 1
    found, outputs = first_order.products(lambda: guided(network, *inputs), copies * images, signs)
    assert torch.equal(outputs, guided(network, *inputs)) and bool(first_order.kept) == (budget is None)
    for number, weight in enumerate(weights):
        for place, word in enumerate(WORDS):
            shift = difference(weight, word, network, inputs)
            expected = torch.einsum("knchw,nchw->nk", signs.double(), shift)
            torch.testing.assert_close(found[number, place], expected, rtol=1e-5, atol=1e-7)


def test_gradients_that_overflow_in_half_precision_are_taken_of_smaller_directions():
    """The gradient of the first weight is 60,000 for each of 64 rows of an image."""
    model = QuantizedModel(nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).half())
    with torch.no_grad():
        model.module[0].weight.fill_(0.1)
        model.module[1].weight.fill_(60000.0)
    weights = [Weight([model.parts[key]], {"mse-3": {}}) for key in model.slots]
    first_order = FirstOrder(model.module, weights, ("mse-3",))
    first_order.kept = {0: torch.full((1, 1), 0.5), 1: torch.zeros(1, 1)}
    ask = lambda: model.module(torch.full((1, 64, 1), 0.1).half())  # noqa: E731
    found, _ = first_order.products(ask, 1, torch.ones(1, 1, 64, 1))
    assert first_order.scale < 1
    assert float(found[0, 0, 0, 0]) == pytest.approx(64 * 60000 * 0.1 * 0.5, rel=0.01)


def test_activations_are_computed_again_where_memory_is_short(dit):
    _, probe, weights = dit
    (question, *_) = probe.questions()
    signs = torch.randint(2, (1, 2, *question.shape)) * 2 - 1
    found = []
    for checkpoints in (False, True):
        first_order = FirstOrder(probe.denoiser, weights, WORDS)
        first_order.checkpoints = checkpoints
        ask = functools.partial(question.ask, range(2))
        found.append(first_order.products(ask, 4, signs)[0])
        assert not probe.denoiser.is_gradient_checkpointing
    torch.testing.assert_close(found[1], found[0])
    with torch.enable_grad():
        layer = nn.Linear(10, 10)
        inputs = torch.zeros(100, 10, requires_grad=True)  # of which a backward pass needs 4,000 bytes
        assert saves_more_than(3999, layer, lambda: layer(inputs))
        assert not saves_more_than(4000, layer, lambda: layer(inputs))


@functools.cache
def load_dit():
    family = FAMILIES["dit"]
    sampler = load_sampler(family, "embedded", torch.device("cpu"))
    settings = SamplingSettings(seed=5, steps=4, guidance=3.0, res=None, batch_size=BatchSize(2))
    recording = sensitivity.record_calls(sampler, [3, 7, 1], settings, 2)
    paths = [rf"transformer_blocks\.{block}\.(attn1\.to_v|ff\.net\.0\.proj|ff\.net\.2)" for block in (3, 14, 25)]
    model = QuantizedModel(sampler.denoiser, family.dtype, include=paths)
    return model, sensitivity.Probe(sampler.denoiser, recording, settings.batch_size), weights_of(model)


@pytest.fixture
def dit():
    return load_dit()


def sketched(dit, directions, batch_size=2):
    _, probe, weights = dit
    sketch, records = Sketch(list(probe.questions()), directions, 0, BatchSize(batch_size)), {}
    first_order = FirstOrder(probe.denoiser, weights, WORDS)
    for number, some, images in sketch.missing(records):
        records |= dict(sketch.find(first_order, number, some, images))
    return sketch, records


def inner_products(numbers):
    """Those of shifts [W, M, K] of different weights."""
    rows, count, methods = numbers.double().flatten(0, 1), *numbers.shape[:2]
    others = ~torch.eye(count, dtype=torch.bool).repeat_interleave(methods, 0).repeat_interleave(methods, 1)
    return (rows @ rows.T)[others]


def test_a_sketch_tells_norms_and_inner_products_of_the_exact_shifts(dit):
    _, probe, weights = dit
    exact = [measure_one(weight, WORDS, probe) for weight in weights]
    changes, shifts = (torch.stack([each[name] for each in exact]).double() for name in ("changes", "shifts"))
    correlations = []
    for directions in (8, 32):
        sketch, records = sketched(dit, directions)
        squares, numbers, share = shifts_of(records, sketch.shares(records))
        assert spearmanr(squares.flatten(), changes.flatten()).statistic > 0.95
        assert float((squares / changes).median()) == pytest.approx(1, abs=0.15)
        assert 0 < share < 1
        correlations.append(np.corrcoef(inner_products(shifts), inner_products(numbers))[0, 1])
    assert 0.4 < correlations[0] < correlations[1] > 0.7


def test_directions_are_at_right_angles_and_their_own():
    rows = torch.stack([random_signs((4, 2, 2), number, 7, 0) for number in range(16)]).flatten(1).long()
    assert torch.equal(rows @ rows.T, 16 * torch.eye(16, dtype=torch.long))
    others = torch.stack([random_signs((4, 2, 2), number, 7, 1) for number in range(16)]).flatten(1).long()
    assert not torch.equal(rows, others)
    many = torch.stack([random_signs((2, 3), 0, seed) for seed in range(4000)]).flatten(1).double()
    torch.testing.assert_close(many.T @ many / 4000, torch.eye(6).double(), rtol=0, atol=0.06)  # of no power of two


def test_a_sketch_does_not_depend_on_the_batch_size(dit):
    found = []
    for size in (1, 2):
        sketch, records = sketched(dit, 3, size)
        found.append(shifts_of(records, sketch.shares(records)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)


def test_most_directions_go_where_shifts_are_large():
    """On average 8: 2 at each of two steps of two images; of 24 others three quarters where squared norms are."""
    questions = [Question(2, 0, step, (100,), 1, None) for step in (0, 1)]
    records = {
        Task(step, 0, 2, 0, 2): {"products": torch.full((1, 1, 2, 2), size), "squares": torch.ones(2)}
        for step, size in ((0, 3**0.5), (1, 1.0))
    }
    sketch = Sketch(questions, 8, 0, BatchSize(2))
    assert sketch.shares(records) == [2 + 9, 2 + 3]
    assert list(sketch.missing(records)) == [(0, range(2, 11), range(2)), (1, range(2, 5), range(2))]
    del records[Task(1, 0, 2, 0, 2)]
    assert next(sketch.missing(records)) == (1, range(2), range(2))


def test_shrinkage_is_the_share_of_noise():
    """Independent shifts, in 50 directions: all of their mean squared cosine of 1/50 is noise. Equal ones: next to none."""
    numbers = torch.randn(40, 2, 50, generator=torch.Generator().manual_seed(0)).double()
    assert shrinkage(numbers, 1 / 50) == pytest.approx(1, abs=0.05)
    assert shrinkage(torch.ones(40, 2, 50).double(), 1 / 50) == pytest.approx(1 / 50)
