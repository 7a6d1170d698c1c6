import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from autobuild import losses


def draw(count=40, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, generator=generator)
    return targets + noise * torch.randn(count, generator=generator), targets


@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_soft_spearman_is_near_the_hard_one(noise):
    scores, targets = draw(noise=noise)
    assert 1 - losses.srcc_loss(scores, targets).item() == pytest.approx(spearmanr(scores, targets)[0], abs=0.05)


@pytest.mark.parametrize("cut", [1, 3, 10, 40])
def test_ndcg_is_scikit_learns(cut):
    scores, targets = draw()
    gains = losses.relevance(targets)
    expected = ndcg_score(gains[None].numpy(), scores[None].numpy(), k=cut)
    assert losses.ndcg(scores, targets, cut) == pytest.approx(expected, rel=1e-6)


def test_ranks_of_equal_values():
    assert losses.ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


@pytest.mark.parametrize("name", list(losses.LOSSES))
def test_descent_finds_the_order(name):
    """Scores that start anywhere end in the targets' order: at its top, or as a whole, or both."""
    start, targets = draw(noise=3.0)
    scores = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([scores], lr=2.0)
    before = losses.ndcg(start, targets)
    for _ in range(1000):
        optimizer.zero_grad()
        losses.LOSSES[name](scores, targets).backward()
        optimizer.step()
    found = losses.ndcg(scores.detach(), targets)
    assert before < 0.8 < found
    if name != "srcc":
        assert found > 0.98
    if name != "ndcg":
        assert spearmanr(scores.detach(), targets)[0] > 0.9


@pytest.mark.parametrize("name", list(losses.LOSSES))
def test_the_right_order_costs_less(name):
    scores, targets = draw(noise=2.0)
    values = [losses.LOSSES[name](each, targets).item() for each in (targets * 5, scores, -targets)]
    assert values == sorted(values) and np.isfinite(values).all()
