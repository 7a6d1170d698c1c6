"""Losses that reward the right order: of scores [N] for the targets [N], both higher for better."""

import torch

SHARPNESS = 10.0  # of soft comparisons, per standard deviation of the scores
NDCG_CUT = 10  # places from the top that count


def srcc_loss(scores, targets):
    """1 - Spearman's rank correlation, with soft ranks in place of the scores' ranks.

    The rank of a score is how many are below it, each counted by a sigmoid of the distance (Qin et al., 2010).
    """
    standard = (scores - scores.mean()) / (scores.std() + 1e-8)
    below = torch.sigmoid(SHARPNESS * (standard[:, None] - standard[None, :]))
    return 1 - pearson(below.sum(dim=1), ranks(targets))


def ndcg_loss(scores, targets, cut=NDCG_CUT):
    """LambdaRank's loss (Burges, 2010): a logistic loss for each pair in the wrong order, weighted by what NDCG@cut
    would gain by exchanging the two. Zero for scores far apart in the right order.
    """
    gains = relevance(targets)  # [N]
    order = torch.argsort(scores, descending=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(scores), device=scores.device)
    discounts = discount(places, cut)
    best = ideal_dcg(gains, cut)
    worth = (gains[:, None] - gains[None, :]).abs() * (discounts[:, None] - discounts[None, :]).abs() / best  # [N, N]
    better = targets[:, None] > targets[None, :]
    standard = (scores - scores.mean().detach()) / (scores.std().detach() + 1e-8)
    pairs = torch.nn.functional.softplus(-(standard[:, None] - standard[None, :]))
    return (pairs * worth * better).sum()


def hybrid_loss(scores, targets):
    """Both: the order of all, and of the best above all."""
    return srcc_loss(scores, targets) + ndcg_loss(scores, targets)


LOSSES = {"srcc": srcc_loss, "ndcg": ndcg_loss, "hybrid": hybrid_loss}


def ndcg(scores, targets, cut=NDCG_CUT):
    """NDCG@cut of an order, 1 for the right one (Jarvelin and Kekalainen, 2002)."""
    gains = relevance(targets)
    chosen = torch.argsort(scores, descending=True)
    return float(
        (gains[chosen] * discount(torch.arange(len(gains), device=gains.device), cut)).sum() / ideal_dcg(gains, cut)
    )


def relevance(targets):
    """Targets as gains in 0..1."""
    low, high = targets.min(), targets.max()
    return (targets - low) / (high - low + 1e-12)


def ideal_dcg(gains, cut):
    places = torch.arange(len(gains), device=gains.device)
    return (gains.sort(descending=True).values * discount(places, cut)).sum() + 1e-12


def discount(places, cut):
    """1 / log2(place + 2) of the first `cut` places, counted from 0; nothing of the others."""
    return torch.where(places < cut, 1 / torch.log2(places + 2.0), 0.0)


def ranks(values):
    """Ranks from 0 of values [N], the mean rank where several are equal."""
    below = (values[None, :] < values[:, None]).sum(dim=1)
    equal = (values[None, :] == values[:, None]).sum(dim=1)
    return below + (equal - 1) / 2


def pearson(x, y):
    x, y = x - x.mean(), (y - y.mean()).to(x.dtype)
    return (x * y).sum() / (x.norm() * y.norm() + 1e-12)
