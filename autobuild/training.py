"""Training of predictors: five folds, each tested on the fifth of the labels that it has not seen.

Folds run side by side, a process each on one thread, as many as there are cores: graphs of a few hundred nodes are too
small to be split. Of what a fold is trained on, an eighth decides which epoch's weights are kept.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from autobuild.losses import LOSSES, ndcg
from autobuild.predictor import GraphTensors, Predictor

FOLDS = 5
BATCH = 16
LEARNING_RATE = 2e-3
FACTOR_LEARNING_RATE = 3e-2  # of the few parameters that say how much a layer type, block or method matters
WEIGHT_DECAY, FACTOR_WEIGHT_DECAY = 1e-2, 1e-1
LARGEST_GRADIENT = 1.0
HELD_OUT = 8  # one of so many training rows tells when to stop
PATIENCE = 15  # epochs without a better one


class TrainingSetup(NamedTuple):
    """What all folds learn from."""

    tensors: GraphTensors
    codes: np.ndarray  # [R, W] method codes
    targets: np.ndarray  # [R] higher is better
    loss: str
    epochs: int
    seed: int


class Fold(NamedTuple):
    """A trained predictor, and what it makes of the rows that it was not trained on."""

    state: dict
    test: list[int]  # numbers of the rows
    predictions: list[float]
    metrics: dict  # {name: float}: of the predictions, and of each level's scores


def split(count, seed):
    """Numbers of the test rows of each fold."""
    return np.array_split(np.random.default_rng(seed).permutation(count), FOLDS)


def train_fold(setup, number, tell=lambda: None):
    """Train fold `number`; `tell` is called after each epoch."""
    torch.manual_seed(setup.seed + number)
    rng = np.random.default_rng([setup.seed, number])
    test = split(len(setup.targets), setup.seed)[number]
    rest = rng.permutation(np.setdiff1d(np.arange(len(setup.targets)), test))
    held_out, train = np.split(rest, [len(rest) // HELD_OUT])
    mean, std = setup.targets[train].mean(), setup.targets[train].std() + 1e-12
    codes, targets = torch.from_numpy(setup.codes), torch.from_numpy((setup.targets - mean) / std).float()
    predictor = Predictor(setup.tensors)
    predictor.note_damages(codes[train], BATCH, levels=True)
    best, waited, kept = np.inf, 0, None
    for _ in _epochs(predictor, codes, targets, train, setup, rng):
        tell()
        error = float(((predict(predictor, codes[held_out])[0] - targets[held_out]) ** 2).mean())
        waited += 1
        if error < best:
            best, waited, kept = error, 0, {name: value.clone() for name, value in predictor.state_dict().items()}
        if waited == PATIENCE:
            break
    predictor.load_state_dict(kept)
    predictor.note_damages(codes[train], BATCH)
    predictions, levels = predict(predictor, codes[test])
    metrics = {"srcc": srcc(predictions, targets[test]), "ndcg": ndcg(predictions, targets[test])}
    for hop, scores in levels.items():
        metrics[f"srcc_hop_{hop}"] = srcc(scores, targets[test])
        predictor.hop_srcc[hop] = max(metrics[f"srcc_hop_{hop}"], 0.0)
    return Fold(predictor.state_dict(), test.tolist(), (predictions.double() * std + mean).tolist(), metrics)


def _epochs(predictor, codes, targets, train, setup, rng):
    """Train the predictor; yields after each epoch."""
    batches = np.array_split(np.arange(len(train)), max(1, len(train) // BATCH))
    factors, scale = [*predictor.embedding.factors.parameters()], [predictor.shares, predictor.bias]
    others = [each for each in predictor.parameters() if all(each is not known for known in (*factors, *scale))]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            {"params": factors, "lr": FACTOR_LEARNING_RATE, "weight_decay": FACTOR_WEIGHT_DECAY},
            {"params": scale, "lr": FACTOR_LEARNING_RATE, "weight_decay": 0.0},
        ]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, setup.epochs * len(batches))
    for _ in range(setup.epochs):
        order = rng.permutation(train)
        for batch in batches:
            rows = torch.from_numpy(order[batch])
            predicted, levels = predictor(codes[rows])
            ranking = sum(LOSSES[setup.loss](scores, targets[rows]) for scores in levels.values()) / len(levels)
            loss = ((predicted - targets[rows]) ** 2).mean() + ranking
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(predictor.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
        yield


@torch.no_grad()
def predict(predictor, codes):
    """Predictions [R] of rows, and their scores [R] of each level."""
    found = [predictor(each) for each in codes.split(BATCH)]
    levels = {hop: torch.cat([each[hop] for _, each in found]) for hop in found[0][1]}
    return torch.cat([predicted for predicted, _ in found]), levels


def srcc(scores, targets):
    """Spearman's rank correlation, 0 where all scores are the same."""
    return float(np.nan_to_num(spearmanr(scores, targets)[0]))


def train(setup, keep=lambda number, fold: None, done=None):
    """All folds {number: Fold}; `keep` is given each as it is done; those in `done` are not trained again."""
    folds = dict(done or {})
    left = [number for number in range(FOLDS) if number not in folds]
    context = multiprocessing.get_context("spawn")
    epochs = context.Value("l", 0)
    workers = max(1, min(len(left), os.cpu_count() or 1))
    progress = tqdm(total=FOLDS * setup.epochs, initial=len(folds) * setup.epochs, desc=f"{FOLDS} folds", unit="epoch")
    with progress, ProcessPoolExecutor(workers, context, _start, (setup, epochs)) as pool:
        waiting = {pool.submit(_train_fold, number): number for number in left}
        try:
            while waiting:
                ended, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for each in ended:
                    number = waiting.pop(each)
                    folds[number] = each.result()
                    keep(number, folds[number])
                progress.update(epochs.value + (FOLDS - len(left)) * setup.epochs - progress.n)
        except BaseException:  # an interrupt too: the pool would wait until the folds at work are done
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return folds


def _start(setup, epochs):
    """Prepare a process that trains folds."""
    global _setup, _epochs_done
    _setup, _epochs_done = setup, epochs
    torch.set_num_threads(1)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent):
    """End this process once its parent has ended, however: nobody would take its fold."""
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _train_fold(number):
    def tell():
        with _epochs_done.get_lock():
            _epochs_done.value += 1

    return train_fold(_setup, number, tell)
