"""The published predictor on labels of ours, run by its own scripts: `python -m benchmarks.predictors --published DIR`.

DIR is a clone of github.com/Ascend-Research/AutoBuild; its scripts need torchsort and pandas beside what this project
needs. They are imported as they are; what is changed spares work and no figure: the gradient that they compute twice
for the same batch is computed once, and their LambdaRank loss, whose gradient their trainer erases before it is used,
is left out. They train for 10,000 epochs, days on a CPU: `epochs` says for how many here, their schedule with it.
"""

import argparse
import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr

from quant.files import load_pickle

NAMES = {"pixart_alpha": "alpha", "dit": "dit"}  # what it calls families, as far as they are compared
ARCHITECTURES = {"alpha": "alpha", "dit": "DiT"}
HOPS = {"alpha": list(range(5)), "dit": [0, 1, 4]}  # whose norms its losses rank


@dataclass(frozen=True)
class Settings:
    """What its training reads, by the names that it has for them; its scripts parse flags only where they are run."""

    families: str
    epochs_predictor: int
    tag: str
    chkpt: str
    target: str = "FID-GT-1k*-1"
    format: str = "sdm"
    seed: int = 12345
    gnn_type: str = "GATv2Conv"
    gnn_dim: int = 64
    num_layers: int = 4
    aggr_method: str = "mean"
    gnn_activ: str = "ReLU"
    reg_activ: str = "ReLU"
    residual: bool = True
    fe_mlp: bool = False
    corr_lambda: float = 1.0
    norm: int = 1
    batch_size: int = 128
    boost: bool = True
    srcc_rel: bool = True


def train(clone, cache, family, loss, epochs, folds):
    """Rank correlation of the folds' predictions with the FID labels of their test rows, higher better."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "folds.json"
        command = [sys.executable, "-m", "benchmarks.published_predictor", clone, cache, NAMES[family], loss, epochs, out]
        subprocess.run(list(map(str, [*command, *folds])), check=True)
        return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, of_type in (("clone", Path), ("cache", Path), ("family", str), ("loss", str), ("epochs", int), ("out", Path)):
        parser.add_argument(name, type=of_type)
    parser.add_argument("folds", type=int, nargs="+")
    args = parser.parse_args()
    out = args.out.resolve()
    torch.set_num_threads(1)
    rows = [row | {"architecture": ARCHITECTURES[args.family]} for row in load_pickle(args.cache)]
    sys.path.insert(0, str(args.clone.resolve()))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("cache", f"saved_models/{args.loss}", "configs"):
            Path(name).mkdir(parents=True)
        Path("cache", f"{args.family}_sdm_cache.pkl").write_bytes(pickle.dumps(rows, protocol=4))
        importlib.import_module("ge_utils.data_loader").CACHE_DIR = str(Path("cache").resolve())
        folds = [train_fold(args, number) for number in args.folds]
    out.write_text(json.dumps(folds))


def train_fold(args, number):
    script = importlib.import_module(f"train_predictor_fold_{args.loss}")
    trainer = importlib.import_module("onnx_ir.trainer")
    trainer.run_regressor_epoch = epoch_of(trainer)
    script.srcc_list = HOPS[args.family]
    if args.loss in ("ndcg", "hybrid"):
        script.LTRLoss = without_lambdarank(script.LTRLoss)
    seen = {}
    split = script.get_regress_train_test_data

    def splitting(*positional, **named):
        train_rows, test_rows, best = split(*positional, **named)
        seen["targets"] = [float(target) for _, target in test_rows]
        return train_rows, test_rows, best

    def listening(statistics):
        def heard(targets, predictions, *rest):
            seen["predictions"] = list(predictions)
            return statistics(targets, predictions, *rest)

        return heard

    named = {"get_regress_train_test_data": splitting}
    for name in ("compute_predictor_test_stats", "compute_predictor_test_stats_ltr"):
        if hasattr(script, name):
            named[name] = listening(getattr(script, name))
    before = {name: getattr(script, name) for name in named}
    settings = Settings(args.family, args.epochs, tag=args.loss, chkpt=args.loss)
    start = time.perf_counter()
    try:
        vars(script).update(named)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            script.train_predictor(settings, number)
    finally:
        vars(script).update(before)
    seconds = time.perf_counter() - start
    srcc = float(spearmanr(seen["targets"], seen["predictions"])[0])
    print(f"published, fold {number}: rank correlation {srcc:.3f}, {seconds:.0f} s", flush=True)
    return srcc


class _Nothing(torch.nn.Module):
    def forward(self, *_):
        return None


def without_lambdarank(loss_class):
    class Loss(loss_class):
        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)
            self.ph = _Nothing()

    return Loss


def epoch_of(trainer):
    """The published epoch with one backward pass for its two: it clips the first gradient and adds the second to it."""

    def epoch(forward, model, data, criterion, optimizer, scheduler=None, max_grad_norm=5.0, **_):
        for batch in data:
            truth = batch.y.to(trainer.device())
            predicted, embeddings = forward(model, batch)
            loss, _ = criterion(predicted, truth, embeddings)
            optimizer.zero_grad()
            loss.backward()
            whole = [(each, each.grad.clone()) for each in model.parameters() if each.grad is not None]
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            for each, gradient in whole:
                each.grad += gradient
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        return 0.0

    return epoch


if __name__ == "__main__":
    main()
