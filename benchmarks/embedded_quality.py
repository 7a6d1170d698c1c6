"""Measure an embedded pipeline: `python -m benchmarks.embedded_quality pixart_alpha`.

Prints, as `measured.json` beside the pipeline holds them: how many of 500 pictures of 50 prompts show
the prompt's digit and its two colours (of a class-conditional model: the class's digit) by a classifier
trained on real digits; and how image quality falls when all weights take one method (plain UAQ at 4 and
3 bits by default), from the same noise, over several seeds. FID is in the classifier's 64 features.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation import fid
from evaluation.constant_images import is_constant, say_constant
from models.drawing import BatchSize, SamplingSettings, generate
from models.embedded.captions import digit_and_colors, subject_prompts
from models.embedded.classifier import classify, held_out_accuracy, load_classifier
from models.embedded.judge import DigitFeatures, digit_reference_folder
from models.families import FAMILIES
from models.pipelines import Extras, load_sampler, pick_device, refiner_of
from quant.model import QuantizedModel
from quant.registry import SEARCH_SPACE

NUM_PROMPTS = 50


def prompts_and_answers(family, count, num_prompts):
    """`count` prompts, `num_prompts` in turn, or class numbers; what each asks for: [count, 3] digit, ink and paper.

    A class asks for no colours: its answer is the digit alone [count, 1].
    """
    if family.num_classes:
        digits = [index % family.embedded.num_classes for index in range(count)]
        return digits, np.array(digits)[:, None]
    pairs = (subject_prompts(num_prompts) * (count // num_prompts + 1))[:count]
    return [caption for _, caption in pairs], np.array([digit_and_colors(subject) for subject, _ in pairs])


def make_pictures(sampler, prompts, seed, guidance, batch_size=None):
    """Pictures (uint8 [N, 64, 64, 3]) of the prompts, each from its own noise."""
    row = sampler.family.embedded
    settings = SamplingSettings(seed, row.steps, guidance, row.resolution, BatchSize(batch_size or row.batch_size))
    pictures = generate(sampler, prompts, settings, "pictures")
    say_constant("pictures", is_constant(pictures))
    return pictures


class Judge:
    """What judges pictures: the classifier, and the statistics of the real digits in its features."""

    def __init__(self):
        device = torch.device("cpu")
        self.classifier, self.extractor = load_classifier(), DigitFeatures(device)
        self.reference = fid.reference_statistics(digit_reference_folder(), self.extractor, device)

    def right(self, pictures, answers):
        """Which pictures show the `answers` [N, parts], part by part."""
        return classify(self.classifier, pictures).numpy()[:, : answers.shape[1]] == answers

    def distances(self, pictures, originals):
        """FID, and mean squared differences of pixels (0..1) and of features to the full-precision pictures."""
        features, wanted = (fid.image_features(each, self.extractor, torch.device("cpu")) for each in (pictures, originals))
        change = (pictures.astype(np.float32) - originals) / 255
        return {
            "fid": fid.distance(features, self.reference),
            "image_mse": float((change**2).mean()),
            "feature_mse": float(((features - wanted) ** 2).mean()),
        }

    def judge(self, pictures, answers, originals):
        """FID, share that shows what was asked for, and mean squared change from the full-precision pictures."""
        distances = self.distances(pictures, originals)
        return {
            "fid": round(distances["fid"], 3),
            "right": round(float(self.right(pictures, answers).all(axis=1).mean()), 4),
            "mean_squared_change": round(distances["image_mse"], 5),
        }


def measure_methods(sampler, args, judge):
    """A line for full precision and for each method on all weights, per guidance and seed."""
    family, denoiser = sampler.family, sampler.denoiser
    prompts, answers = prompts_and_answers(family, args.quality_count, args.quality_count)
    model = QuantizedModel(denoiser, **family.quantization)
    originals = {}
    guidances = args.guidances or [family.embedded.label_guidance, family.embedded.guidance]
    for method in (None, *args.methods):  # None is full precision
        model.apply(method) if method else model.restore()
        for guidance, seed in itertools.product(guidances, args.seeds):
            pictures = make_pictures(sampler, prompts, seed, guidance, args.batch_size)
            original = originals.setdefault((guidance, seed), pictures)
            line = {"weights": method or "full precision", "guidance": guidance, "seed": seed}
            line |= judge.judge(pictures, answers, original)
            tqdm.write(json.dumps(line))
            yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--count", type=int, default=500, help="pictures of 50 prompts that are judged")
    parser.add_argument("--quality_count", type=int, default=500, help="pictures per line of the quality under methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--guidances", type=float, nargs="+", help="default: the one for labels and the one for pictures")
    parser.add_argument("--methods", nargs="*", default=["mse-4", "mse-3"], choices=list(SEARCH_SPACE))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, help="default: the family's; changes results by float rounding at most")
    parser.add_argument("--output", type=Path, help="also write the result there")
    args = parser.parse_args()
    family = FAMILIES[args.family]
    row = family.embedded
    judge = Judge()

    sampler = load_sampler(family, "embedded", pick_device(args.device), Extras(refiner_of(family, "embedded")))
    prompts, answers = prompts_and_answers(family, args.count, NUM_PROMPTS)
    shown = judge.right(make_pictures(sampler, prompts, args.seeds[0], row.guidance, args.batch_size), answers)
    result = {
        "classifier_right_on_held_out_real_digits": [round(share, 4) for share in held_out_accuracy(judge.classifier)],
        "pictures": args.count,
        "pictures_for_quality": args.quality_count,
        "steps": row.steps,
        "guidance": row.guidance,
        "right": round(float(shown.all(axis=1).mean()), 4),
        "right_in_digit_ink_paper": [round(float(share), 4) for share in shown.mean(axis=0)],
    }
    print(json.dumps(result, indent=1))
    result["quality"] = list(measure_methods(sampler, args, judge))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
