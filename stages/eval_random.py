"""Stage 2: draw random configurations and label each with its size, error, BOPs and FID."""

import contextlib
import json
import math
import shutil
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import constants
from bops.bops import tera_bops
from bops.macs import count_macs
from errors import InputError
from evaluation import fid, prompts, quant_cache
from evaluation.clip_score import CLIP_MODEL, ClipScore
from evaluation.images import generate, save_png
from evaluation.stopwatch import Stopwatch
from models.embedded.captions import subject_prompts
from models.pipelines import defaults, is_embedded, meta_denoiser, pick_device
from models.prompt_memo import PromptMemo
from quant import config, modules, multiquantizer
from quant.storage import atomic_write
from stages.common import (
    add_sampling_flags,
    at_least,
    load_for,
    log,
    only_run_in,
    parse_sampling,
    parser_for,
    save_settings,
    share,
    start_log,
)

# A label depends on these flags; a run goes on only with the same ones.
LABEL_FLAGS = (
    "model_id",
    "refiner_id",
    "seed",
    "n_imgs",
    "prompts_key",  # the prompts, or class numbers, themselves
    "res",
    "steps",
    "guidance",
    "clip_score",
    "clip_model",
    "a_l",
    "a_u",
    "published_noise",
    "reference_key",  # what is in the folder of --reference
    "multiquantizer_key",  # what is in the file of --multi_chkpt
)


def main(family):
    args = parse_args(family)
    device = pick_device(args.device)
    if args.reference is None:
        embedded = is_embedded(family, args.model_id)
        args.reference = fid.digit_reference_folder() if embedded else Path(getattr(constants, family.reference_images))
    args.reference_key = fid.folder_key(args.reference, times=False)
    args.multiquantizer_key = multiquantizer.file_key(args.multi_chkpt, family)
    image_prompts = prompts_for(args, family)
    args.prompts_key = prompts.key(image_prompts)
    with only_run_in(args.outdir):
        run(family, args, device, image_prompts)


def run(family, args, device, image_prompts):
    settings = args.outdir / "sampling_config.yaml"
    check_same_run(args, settings)
    start_log(args.outdir)
    # The reference first, in case it fails.
    extractor = fid.DigitFeatures(device) if is_embedded(family, args.model_id) else fid.InceptionFeatures(device)
    reference = fid.reference_statistics(args.reference, extractor, device)
    labeller = Labeller(family, args, device, image_prompts, extractor, reference)
    save_settings(args, settings)

    try:
        full_precision = measure_full_precision(labeller, args.outdir / "full_precision.json")
        log.info("full precision: FID %.3f", full_precision["FID-GT-1k"])
        rows = label_configurations(labeller, args)
    finally:
        log.info("where the time went\n%s", "\n".join(labeller.watch.table()))
    table = "\n".join(results_table(rows, full_precision))
    (args.outdir / "results.txt").write_text(table + "\n")
    log.info("labels: %s\n%s", args.outdir / "quant_cache.pkl", table)


def parse_args(family):
    parser = parser_for(family, "eval_random", "label random quantization configurations with FID")
    parser.add_argument("--outdir", type=Path, default=Path(f"{family.name}_random_seed42"), help="folder of the results")
    parser.add_argument("--num_archs", type=at_least(1), default=500, help="configurations to label")
    parser.add_argument("--n_imgs", type=at_least(2), default=1000, help="images per configuration")
    parser.add_argument("--a_l", type=share, default=0.0, help="least expected share of 3-bit weights")
    parser.add_argument("--a_u", type=share, default=1.0, help="largest expected share of 3-bit weights")
    parser.add_argument("--reference", type=Path, help="folder of real images; default the one in constants.py")
    parser.add_argument("--published_noise", action="store_true", help="start every image from the same seed, as published")
    parser.add_argument("--keep_samples", action="store_true", help="keep the images in <outdir>/samples")
    parser.set_defaults(prompts=None, clip_score=False, clip_model=None)
    if not family.num_classes:
        parser.add_argument("--prompts", type=Path, help="COCO captions, or text, a prompt a line; default in constants.py")
        parser.add_argument("--clip_score", action="store_true", help="label with the CLIP score too")
        parser.add_argument("--clip_model", default=CLIP_MODEL, help="CLIP of --clip_score: Hub id or local folder")
    add_sampling_flags(parser, family)
    args = parse_sampling(parser, family, guidance="label_guidance")
    if args.a_l > args.a_u:
        raise InputError(f"--a_l {args.a_l} is above --a_u {args.a_u}")
    return args


def prompts_for(args, family):
    """`n_imgs` prompts, or class numbers for a family that has no prompts."""
    row = defaults(family, args.model_id)
    if family.num_classes:
        return [index % row.num_classes for index in range(args.n_imgs)]
    if args.prompts is None and is_embedded(family, args.model_id):
        return [caption for _, caption in subject_prompts(args.n_imgs)]
    return prompts.load(args.prompts or Path(constants.COCO_2017_PROMPTS), args.n_imgs)


def check_same_run(args, settings):
    """Refuse to mix labels made under other flags into one cache."""
    if not settings.exists():
        if (args.outdir / "quant_cache.pkl").exists():
            raise InputError(f"{args.outdir}: has labels but no {settings.name} that says how they were made")
        return
    before = read_settings(settings)
    for flag in LABEL_FLAGS:
        if before.get(flag) != getattr(args, flag, None):
            raise InputError(
                f"{args.outdir}: its labels were made with {flag} {before.get(flag)}, not {getattr(args, flag, None)}; "
                "give the same flags to go on, or another --outdir"
            )


def read_settings(path):
    """The flags that a run was started with, as `save_settings` wrote them."""
    try:
        settings = OmegaConf.load(path)
    except Exception as reason:  # the YAML reader raises many types
        settings = type(reason).__name__
    if not isinstance(settings, DictConfig) or "seed" not in settings:
        raise InputError(f"{path}: damaged; move it and the labels beside it away, or give another --outdir")
    return settings


class Labeller:
    """Everything that measuring a configuration needs, set up once."""

    def __init__(self, family, args, device, image_prompts, extractor, reference):
        self.family, self.args, self.device = family, args, device
        self.prompts, self.extractor, self.reference = image_prompts, extractor, reference
        self.clip = ClipScore(args.clip_model, device) if args.clip_score else None
        self.watch = Stopwatch(device)
        self.sampler = load_for(args, family, device)
        denoiser = self.sampler.denoiser
        self.slots, self.entries = multiquantizer.load(args.multi_chkpt, denoiser, family)
        self.macs = count_macs(meta_denoiser(denoiser), self.sampler.denoiser_inputs(args.res))
        self.parts = modules.install(denoiser, family, self.slots)
        self.memos = self.remember_prompts()
        for pipeline in self.sampler.pipelines:
            pipeline.vae.decode = self.watch.timed("decode", pipeline.vae.decode)

    def remember_prompts(self):
        """Memos of the pipelines' prompt embeddings, kept in <outdir>."""
        memos = []
        for number, pipeline in enumerate(self.sampler.pipelines):
            if not hasattr(pipeline, "encode_prompt"):
                continue
            path = self.args.outdir / f"prompt_embeddings{'_refiner' if number else ''}.pt"
            memos.append(PromptMemo(pipeline, path, str(self.args.refiner_id if number else self.args.model_id)))
            pipeline.encode_prompt = self.watch.timed("encode", pipeline.encode_prompt)
        return memos

    def label(self, configuration, name):
        """The row of a configuration; None stands for full precision."""
        with self.watch.phase("quantize"):
            self.put(configuration)
        if configuration is None:
            description = config.describe_full_precision(self.slots, self.family.precision_bits)
        else:
            description = config.describe(configuration, self.slots, self.entries, self.family.precision_bits)
        return {
            "quantized_size": config.quantized_size(description),
            "avg_bits": config.avg_bits(description, self.family.precision_bits),
            "quantized_error": float(sum(row[3] for row in description.values())),
            **self.measure_images(name),
            "bops": tera_bops(self.macs, self.slots, {key: row[0] for key, row in description.items()}),
            "config": description,
        }

    def put(self, configuration):
        if configuration is None:
            config.restore(self.parts)
        else:
            config.apply(configuration, self.parts, self.slots, self.entries)

    def measure_images(self, name):
        """FID, and CLIP score if asked for, of images of the weights in force; NaN if an image is not made of numbers.

        With --keep_samples the images are kept in <outdir>/samples/<name>.
        """
        with self.watch.phase("denoise"):
            images = list(generate(self.sampler, self.prompts, self.args, name, keep_bar=False))
        for memo in self.memos:  # all prompts are known now
            memo.save()
            memo.release()
        if self.args.keep_samples:
            with self.watch.phase("write"):
                self.keep(images, self.args.outdir / "samples" / name)
        bad = sum(image is None for image in images)
        if bad:
            log.warning("%s: %d of %d images have values that are not numbers; its labels are NaN", name, bad, len(images))
            return {"FID-GT-1k": math.nan} | ({quant_cache.CLIP_SCORE: math.nan} if self.clip else {})
        with self.watch.phase("features"):
            features = fid.image_features(images, self.extractor, self.device)
        with self.watch.phase("FID"):
            labels = {"FID-GT-1k": fid.distance(features, self.reference)}
        if self.clip:
            with self.watch.phase("CLIP score"):
                labels[quant_cache.CLIP_SCORE] = float(self.clip.scores(images, self.prompts).mean())
        return labels

    @staticmethod
    def keep(images, folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for index, image in enumerate(images):
            if image is not None:
                save_png(image, folder / f"{index:05d}.png")


def measure_full_precision(labeller, path):
    """The full-precision row without its configuration, measured once and stored in `path`."""
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        row = json.loads(path.read_text())
        if isinstance(row, dict) and config.is_row(row | {"config": {}}):
            return row
    row = labeller.label(None, "full_precision")
    del row["config"]
    with atomic_write(path) as file:
        file.write(json.dumps(row, indent=1).encode())
    return row


def label_configurations(labeller, args):
    """Label configurations until `quant_cache.pkl` has `num_archs` rows; each row is saved as it comes."""
    path = args.outdir / "quant_cache.pkl"
    rows = quant_cache.load(path)
    for index, row in enumerate(rows):
        drawn = config.draw_random(labeller.slots, args.seed, index, args.a_l, args.a_u)
        if drawn != {key: value[0] for key, value in row["config"].items()}:
            raise InputError(f"{path}: row {index + 1} is not configuration {index + 1} of --seed {args.seed}")
    with logging_redirect_tqdm([log]), tqdm(initial=len(rows), total=args.num_archs, desc="configurations") as progress:
        for index in range(len(rows), args.num_archs):
            start = time.monotonic()
            configuration = config.draw_random(labeller.slots, args.seed, index, args.a_l, args.a_u)
            rows.append(labeller.label(configuration, f"config_{index:03d}"))
            with labeller.watch.phase("write"):
                quant_cache.save(rows, path)
            progress.update()
            row = rows[-1]
            log.info(
                "configuration %d: avg_bits %.3f, FID %.3f, %.0f s",
                index + 1,
                row["avg_bits"],
                row["FID-GT-1k"],
                time.monotonic() - start,
            )
    return rows


def results_table(rows, full_precision):
    """Lines of a table: configuration, average bits, size, FID; best first."""
    yield f"{'configuration':<16}{'avg_bits':>9}{'size (MB)':>11}{'BOPs (T)':>10}{'FID':>9}"
    numbered = [("full precision", full_precision)]
    order = sorted(enumerate(rows, 1), key=lambda pair: (math.isnan(pair[1]["FID-GT-1k"]), pair[1]["FID-GT-1k"]))
    numbered += [(str(number), row) for number, row in order]
    for name, row in numbered:
        yield (
            f"{name:<16}{row['avg_bits']:>9.3f}{row['quantized_size'] / 1e6:>11.3f}"
            f"{row['bops']:>10.4f}{row['FID-GT-1k']:>9.3f}"
        )
