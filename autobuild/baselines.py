"""What a predictor must beat: cheap guesses of the target, on the same folds."""

import numpy as np
from sklearn.linear_model import RidgeCV

from autobuild.space import NAMES
from autobuild.training import split, srcc

ALPHAS = np.logspace(-1, 6, 29)


def compare(rows, codes, targets, seed):
    """{name: rank correlation [folds] with the targets} of simple guesses; of the row's numbers their sign is known."""
    tests = split(len(targets), seed)
    numbers = {
        "average bits": np.array([row["avg_bits"] for row in rows]),
        "sum of errors": -np.array([row["quantized_error"] for row in rows]),
    }
    found = {name: [srcc(values[test], targets[test]) for test in tests] for name, values in numbers.items()}
    found["ridge on one-hot methods"] = [ridge(codes, targets, test) for test in tests]
    return found


def ridge(codes, targets, test):
    """Rank correlation on the test rows of a ridge regression on the methods of all weights, one-hot."""
    features = np.eye(len(NAMES))[codes].reshape(len(codes), -1)
    train = np.setdiff1d(np.arange(len(codes)), test)
    mean, std = features[train].mean(axis=0), features[train].std(axis=0)
    features = (features - mean) / np.where(std > 0, std, 1)
    return srcc(RidgeCV(ALPHAS).fit(features[train], targets[train]).predict(features[test]), targets[test])
