"""Train a predictor on labelled configurations."""

from pathlib import Path

import numpy as np

from errors import InputError
from models.families import FAMILIES
from stages.common import OneLineParser, at_least, check_extra, seed
from stages.labelling import label_runs

LEAST_ROWS = 40  # of a cache: a fold is tested on eight


def main():
    args = parse_args()
    check_extra("torch_geometric", "autobuild", "train_predictor.py needs PyTorch Geometric")
    from autobuild import baselines, predictor_file, space, training
    from autobuild.predictor import GraphTensors
    from autobuild.targets import evaluate

    rows, numbers = read_labels(args)
    targets = evaluate(args.target, numbers)
    usable = np.flatnonzero(np.isfinite(targets))
    if len(usable) < LEAST_ROWS:
        raise InputError(
            f"--cache {args.cache[0]}: {len(usable)} of {len(rows)} rows have a number for --target {args.target!r}; "
            f"a predictor needs at least {LEAST_ROWS}, a few hundred are better: label more with *_eval_random.py"
        )
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable)} of {len(rows)} rows have no number for the target and are left out")
    rows, targets = [rows[place] for place in usable], targets[usable]
    known = space.of_rows(args.family, rows, str(args.cache[0]))
    setup = training.TrainingSetup(GraphTensors(known), known.codes(rows), targets, args.loss, args.epochs, args.seed)
    key = predictor_file.key_of(known, setup)
    told = {"target": args.target, "loss": args.loss, "rows": len(rows)}
    folds = predictor_file.load_folds(args.output, key)

    def keep(number, fold):
        folds[number] = fold
        predictor_file.save(args.output, known, key, told, folds)

    training.train(setup, keep, dict(folds))
    found = {"predictor": [folds[number].metrics["srcc"] for number in range(training.FOLDS)]}
    found |= baselines.compare(rows, setup.codes, targets, args.seed)
    print("\n".join(table(found, args, len(rows))))
    print(f"predictor: {args.output}")


def parse_args():
    parser = OneLineParser(
        prog="train_predictor.py", description="train a predictor on labelled configurations", allow_abbrev=False
    )
    parser.add_argument("--family", required=True, choices=list(FAMILIES))
    parser.add_argument(
        "--cache", type=Path, nargs="+", required=True, help="quant_cache.pkl, or --outdir of *_eval_random.py, or several"
    )
    parser.add_argument(
        "--target", default="-1*log(FID-GT-1k)", help="what to predict, higher being better, of the rows' numbers"
    )
    parser.add_argument("--loss", choices=["srcc", "ndcg", "hybrid"], default="hybrid", help="ranking loss")
    parser.add_argument("--epochs", type=at_least(1), default=40, help="at most; a fold that gets no better stops before")
    parser.add_argument("--seed", type=seed, default=42)
    parser.add_argument("--output", type=Path, help="file to write; default predictors/<family>.pt")
    return parser.parse_args(complete=lambda args: {"output": args.output or Path("predictors") / f"{args.family}.pt"})


def read_labels(args):
    """The rows of all caches, and of each the numbers that a target may be made of."""
    runs = [label_runs.read(path) for path in args.cache]
    label_runs.check_mergeable(runs)
    return [row for run in runs for row in run.rows], [numbers for run in runs for numbers in run.numbers()]


def table(found, args, count):
    """Lines: rank correlation with the target on the rows that each fold has not seen."""
    yield f"{args.family}, {count} rows, target {args.target}, {args.loss}"
    yield f"{'rank correlation on unseen rows':<34}{'mean':>7}   folds"
    for name, values in found.items():
        yield f"{name:<34}{np.mean(values):>7.3f}   {' '.join(f'{value:.2f}' for value in values)}"
    best = max(found, key=lambda name: np.mean(found[name]))
    if best != "predictor":
        yield f"{best} ranks these labels better than the predictor: more rows, or another --target, may help"
