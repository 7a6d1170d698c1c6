"""What predictors cost: `python -m benchmarks.autobuild [pixart_alpha ...]`.

For each family, at its own size: seconds to trace its graph and the most memory that takes, imports and all; seconds to
score all variants of all its subgraphs with five folds; of the families of --train, seconds to train five folds on
--rows configurations. Errors are made up, and labels are their sums; a fold may stop early.
Run it where nothing else runs. Writes benchmarks/results/autobuild.json.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch

from autobuild import space as spaces
from autobuild import training
from autobuild.predictor import GraphTensors, Predictor
from autobuild.scores import LearnedScores
from benchmarks.machine import peak_memory, write_result
from models.families import FAMILIES
from quant.slots import free_keys

EPOCHS, SEED = 40, 42
NOTED = 16  # configurations that an untrained predictor's subgraphs are standardized over
TRACING = "import sys; from benchmarks.autobuild import tell_tracing; tell_tracing(sys.argv[1])"


def main():
    args = parse_args()
    lines = []
    print(
        f"{'family':<14}{'nodes':>6}{'weights':>8}{'tracing':>10}{'memory':>9}{'variants':>10}{'scoring':>9}{'training':>10}"
    )
    for family in args.families:
        line = json.loads(subprocess.run([sys.executable, "-c", TRACING, family], stdout=subprocess.PIPE, check=True).stdout)
        space = space_of(family)
        line |= {"nodes": len(space.graph.nodes), "weights": len(space.keys)} | scoring(space)
        line["training_seconds"] = training_seconds(space, args.rows) if family in args.train else None
        trained = f"{line['training_seconds']:>8.0f} s" if family in args.train else ""
        print(
            f"{family:<14}{line['nodes']:>6}{line['weights']:>8}{line['tracing_seconds']:>8.1f} s"
            f"{line['tracing_bytes'] / 1e9:>6.2f} GB{line['variants']:>10}{line['scoring_seconds']:>7.1f} s{trained}",
            flush=True,
        )
        lines.append({"family": family, **line})
    write_result("autobuild", {"rows": args.rows, "epochs": EPOCHS, "families": lines})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--train", nargs="*", choices=list(FAMILIES), default=["pixart_alpha", "dit"])
    return parser.parse_args()


def tell_tracing(family):
    start = time.perf_counter()
    spaces.graph_and_keys(family)
    print(json.dumps({"tracing_seconds": time.perf_counter() - start, "tracing_bytes": peak_memory(torch.device("cpu"))}))


def space_of(family):
    """A family's search space, its errors made up."""
    _, slots = spaces.graph.slots_of_family(family)
    rng = np.random.default_rng(SEED)
    entries = {
        slots[key].file_key: {"shape": slots[key].shape, "errors": {name: np.exp(rng.normal()) for name in spaces.NAMES}}
        for key in free_keys(slots)
    }
    return spaces.of_multiquantizer(FAMILIES[family], entries)


def random_codes(space, count):
    return np.random.default_rng(SEED).integers(len(spaces.NAMES), size=(count, len(space.keys)))


def scoring(space):
    predictor = Predictor(GraphTensors(space))
    predictor.note_damages(torch.from_numpy(random_codes(space, NOTED)), NOTED, levels=True)
    start = time.perf_counter()
    decisions = LearnedScores(space, [predictor.state_dict()] * training.FOLDS).decisions()
    return {"scoring_seconds": time.perf_counter() - start, "variants": sum(len(decision.codes) for decision in decisions)}


def training_seconds(space, count):
    codes = random_codes(space, count)
    targets = -space.errors[np.arange(len(space.keys)), codes].sum(axis=1)
    start = time.perf_counter()
    training.train(training.TrainingSetup(GraphTensors(space), codes, targets, "hybrid", EPOCHS, SEED))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
