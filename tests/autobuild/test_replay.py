"""What a denoiser was asked, asked again: by hand for a denoiser that multiplies."""

import pytest
import torch
from torch import nn

from autobuild.replay import Replay, Step, guidance_weights, record_steps
from errors import InputError

SCALE = 3.0


class Denoiser(nn.Module):
    """Multiplies each row by a number of its own; the second half of the channels tells the variance."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0, 5.0]))

    def forward(self, sample, scale):
        rows = sample * self.factor[:, None, None, None] * scale
        return (torch.cat([rows, 100 * rows], dim=1),)


class Scheduler:
    def __init__(self, steps):
        self.timesteps = list(range(steps))

    def step(self, guided, sample):
        return sample - guided / 100


class Pipeline:
    """Guided: two copies of a picture, combined, in `steps` steps; `late` is asked in the last of them."""

    def __init__(self, steps, names=("first",)):
        self.steps = steps
        for name in names:
            setattr(self, name, Denoiser())
        self.names = names
        self.scheduler = Scheduler(steps)

    def __call__(self, sample):
        for step in range(self.steps):
            name = self.names[-1] if step == self.steps - 1 else self.names[0]
            both = getattr(self, name)(torch.cat([sample, sample]), scale=torch.tensor(step + 1.0))[0][:, : sample.shape[1]]
            guided = both[:1] + SCALE * (both[1:] - both[:1])
            sample = self.scheduler.step(guided, sample)
        return sample


def sample(seed=0):
    return torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_steps_are_evenly_spaced_and_every_denoiser_is_heard():
    pipeline = Pipeline(9, ("first", "late"))
    found = record_steps(pipeline, pipeline.names, [{"sample": sample(0)}, {"sample": sample(1)}], 3)
    scales = {name: [float(each.calls[0][0]["scale"]) for each in steps] for name, steps in found.items()}
    assert scales == {"first": [1, 5, 1, 5], "late": [9, 9]}
    assert torch.equal(found["first"][0].calls[0][0]["sample"], torch.cat([sample(0)] * 2))
    assert "step" not in vars(pipeline.scheduler)
    assert "forward" not in vars(pipeline.first) and "forward" not in vars(pipeline.late)


def test_guidance_is_found_and_the_variance_left_aside():
    (step,) = record_steps(Pipeline(1), ("first",), [{"sample": sample()}], 1)["first"]
    # Both copies hold the same sample, times 2 and 5: only the combination is determined, 2 a + 5 b = 2 + 3 (5 - 2).
    a, b = guidance_weights(step).tolist()
    assert 2 * a + 5 * b == pytest.approx(11, rel=1e-5)
    independent = [torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(4))]
    guided = independent[0][:1, :4] * -2 + independent[0][1:, :4] * 3
    assert guidance_weights(Step([({}, independent)], guided)).tolist() == pytest.approx([-2, 3], rel=1e-5)
    assert guidance_weights(Step([({}, independent)], guided**2)) is None
    assert guidance_weights(Step([({}, independent)], guided[:, :, :2])) is None


def test_a_shift_is_that_of_the_guided_output():
    pipeline = Pipeline(1)
    replay = Replay(pipeline.first, record_steps(pipeline, ("first",), [{"sample": sample()}], 1)["first"], "cpu")
    before = pipeline.first.factor.detach().clone()

    def put(factor):
        pipeline.first.factor.data = before * factor

    assert replay.start_at([]) == 0
    assert replay.shift(put, 1)[0] == 0
    change, shift = replay.shift(put, 1.5)
    assert change == pytest.approx(0.25, rel=1e-4)
    assert torch.allclose(shift, 0.5 * sample().flatten() / sample().norm(), atol=1e-5)


def test_questions_are_the_steps_with_gradients():
    pipeline = Pipeline(3)
    replay = Replay(pipeline.first, record_steps(pipeline, ("first",), [{"sample": sample()}], 3)["first"], "cpu")
    questions = list(replay.questions())
    assert [question.shape for question in questions] == [(36,)] * 3 and len({each.step for each in questions}) == 3
    answer = questions[1].ask(range(1))
    assert answer.shape == (1, 36) and answer.requires_grad
    assert torch.allclose(answer[0], replay.steps[1].guided.flatten(), rtol=1e-4, atol=1e-5)


def test_a_sampler_that_is_not_heard_is_told():
    pipeline = Pipeline(1, ("first", "never", "last"))
    with pytest.raises(InputError, match="its first is not asked between steps"):
        record_steps(pipeline, ("first",), [{"sample": sample()}], 1)
