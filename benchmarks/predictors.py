"""How well predictors rank labels that they have not seen: `python -m benchmarks.predictors`.

Five folds on each of the embedded models' labels that come with the program: this program's predictor with each loss,
and with another target; average bits, sum of errors and a ridge regression on one-hot methods; with --published DIR,
a clone of github.com/Ascend-Research/AutoBuild, the published predictor. All are judged by rank correlation with what
they are to foretell. Writes benchmarks/results/predictors.json.
"""

import argparse
from pathlib import Path

import numpy as np

from autobuild import baselines, space, training
from autobuild.predictor import GraphTensors
from autobuild.targets import evaluate
from benchmarks import published_predictor
from benchmarks.machine import write_result
from stages.labelling import label_runs

LABELS = Path(__file__).parents[1] / "labels"
FID, CHANGE = "-1*log(FID-GT-1k)", "-1*log(feature_mse)"
SEED, EPOCHS = 42, 40


def main():
    args = parse_args()
    result = {}
    for family in args.families:
        run = label_runs.read(LABELS / f"{family}_embedded")
        known = space.of_rows(family, run.rows)
        found = {}
        for target, loss in [(FID, "srcc"), (FID, "ndcg"), (FID, "hybrid"), (CHANGE, "hybrid")]:
            targets = evaluate(target, list(run.numbers()))
            found[f"predictor, {loss}, {target}"] = ours(known, run.rows, targets, loss)
        for target in (FID, CHANGE):
            targets = evaluate(target, list(run.numbers()))
            for name, values in baselines.compare(run.rows, known.codes(run.rows), targets, SEED).items():
                found[f"{name}, {target}"] = values
        if args.published:
            cache = LABELS / f"{family}_embedded" / "quant_cache.pkl"
            for loss in args.published_losses:
                each = published_predictor.train(
                    args.published, cache, family, loss, args.published_epochs, args.published_folds
                )
                found[f"published, {loss}, {args.published_epochs} epochs"] = each
        print("\n".join(table(family, len(run.rows), found)))
        result[family] = {"rows": len(run.rows), "found": found}
    write_result("predictors", {"families": result})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=["pixart_alpha", "dit"])
    parser.add_argument("--published", type=Path, help="clone of the published predictor's repository")
    parser.add_argument("--published_epochs", type=int, default=100)
    parser.add_argument("--published_losses", nargs="+", default=["hybrid"])
    parser.add_argument("--published_folds", type=int, nargs="+", default=list(range(training.FOLDS)))
    return parser.parse_args()


def ours(known, rows, targets, loss):
    """Rank correlations of all folds."""
    setup = training.TrainingSetup(GraphTensors(known), known.codes(rows), targets, loss, EPOCHS, SEED)
    folds = training.train(setup)
    return [folds[number].metrics["srcc"] for number in range(training.FOLDS)]


def table(family, count, found):
    yield f"{family}, {count} rows: rank correlation with the target on unseen rows"
    yield f"{'':<48}{'mean':>7}{'worst':>7}"
    for name, values in found.items():
        yield f"{name:<48}{np.mean(values):>7.3f}{np.min(values):>7.3f}"


if __name__ == "__main__":
    main()
