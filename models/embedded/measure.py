"""Measure an embedded pipeline: `python -m models.embedded.measure dit`.

Prints, as the README beside the pipeline holds them: how many of 1,000 generated digits a classifier
trained on real ones takes for their label, and how image quality falls when all weights take one
method (plain UAQ at 4 and 3 bits by default), from the same noise, over three seeds.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation import fid
from evaluation.images import generate, save_png
from models.embedded.classifier import classify, held_out_accuracy, load_classifier
from models.families import FAMILIES
from models.layers import find_slots
from models.pipelines import denoiser_of, load_pipeline
from quant import methods, modules
from quant.multiquantizer import slot_weight


def make_digits(pipeline, row, count, seed, guidance):
    """`count` digits (uint8 [count, 64, 64, 3]), 0 to 9 in turn."""
    settings = argparse.Namespace(seed=seed, steps=row.steps, guidance=guidance, batch_size=100)
    class_ids = [index % row.num_classes for index in range(count)]
    return np.stack(list(generate(pipeline, class_ids, settings, "digits", keep_bar=False)))


def accuracy(classifier, digits):
    """Share of the digits, 0 to 9 in turn, that are classified as their label."""
    return float((classify(classifier, digits).numpy() == np.arange(len(digits)) % 10).mean())


def digit_fid(digits, extractor, reference):
    batches = torch.from_numpy(digits).permute(0, 3, 1, 2).float().split(256)
    features = np.concatenate([extractor.model(batch).numpy() for batch in batches])
    return fid.distance(features, reference)


class Judge:
    """What judges digits: the classifier, and the statistics of the real ones in its features."""

    def __init__(self):
        device = torch.device("cpu")
        self.classifier, self.extractor = load_classifier(), fid.DigitFeatures(device)
        self.reference = fid.reference_statistics(fid.digit_reference_folder(), self.extractor, device)

    def judge(self, digits, originals):
        """FID, share classified as their label, and mean squared change from the full-precision pictures."""
        change = (digits.astype(np.float32) - originals) / 255
        return {
            "fid": round(digit_fid(digits, self.extractor, self.reference), 3),
            "accuracy": round(accuracy(self.classifier, digits), 4),
            "mean_squared_change": round(float((change**2).mean()), 5),
        }


def measure_methods(pipeline, family, args, judge):
    """A line for full precision and for each method on all weights, per guidance and seed."""
    denoiser = denoiser_of(pipeline, family)
    slots = find_slots(denoiser, family)
    parameters = {key: methods.fit(slot_weight(denoiser, slot, family)) for key, slot in slots.items()}
    layers = modules.install(denoiser, family)
    originals = {}
    for method in (None, *args.methods):  # None is full precision
        for key, layer in layers.items():
            layer.set_method(method, method and parameters[key][method])
        for guidance, seed in itertools.product(args.guidances, args.seeds):
            digits = make_digits(pipeline, family.embedded, args.count, seed, guidance)
            original = originals.setdefault((guidance, seed), digits)
            line = {"weights": method or "full precision", "guidance": guidance, "seed": seed}
            line |= judge.judge(digits, original)
            tqdm.write(json.dumps(line))
            yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10_000, 20_000])
    parser.add_argument("--guidances", type=float, nargs="+", help="default: the one for labels and the one for pictures")
    parser.add_argument(
        "--output", type=Path, help="also write the result there, and a sheet of digits, digits.png, beside it"
    )
    parser.add_argument("--methods", nargs="*", default=["mse-4", "mse-3"], choices=list(methods.METHODS))
    args = parser.parse_args()
    family = FAMILIES[args.family]
    row, judge = family.embedded, Judge()
    args.guidances = args.guidances or [row.label_guidance, row.guidance]

    pipeline = load_pipeline(family, "embedded", torch.device("cpu"))
    shown = make_digits(pipeline, row, args.count, args.seeds[0], row.guidance)
    result = {
        "classifier_accuracy_on_held_out_real_digits": round(held_out_accuracy(judge.classifier), 4),
        "digits": args.count,
        "steps": row.steps,
        "guidance": row.guidance,
        "digits_classified_as_their_label": round(accuracy(judge.classifier, shown), 4),
    }
    print(json.dumps(result, indent=1))
    result["quality"] = list(measure_methods(pipeline, family, args, judge))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        rows = shown[:100].reshape(5, 20, *shown.shape[1:])
        sheet = np.concatenate([np.concatenate(list(line), axis=1) for line in rows])
        save_png(sheet, args.output.parent / "digits.png")


if __name__ == "__main__":
    main()
