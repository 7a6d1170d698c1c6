"""Folders of labelled configurations, read: what reports are made of and predictors learn from."""

from pathlib import Path
from typing import NamedTuple

from errors import InputError, shown
from evaluation import quant_cache
from quant.checked_files import from_json
from stages.labelling import json_lines
from stages.run_folder import read_settings
from stages.sampling import IMAGE_FLAGS

# A label depends on these flags; a run goes on only with the same ones.
LABEL_FLAGS = (
    *IMAGE_FLAGS,
    "refiner_id",
    "vae_tiling",
    "clip_score",
    "clip_model",
    "a_l",
    "a_u",
    "published_noise",
    "chosen_key",  # what --q_config names
    "halving_key",  # --budget_images, and among how many configurations
    "reference_key",  # what is in the folder of --reference
)
OWN_FLAGS = ("seed", "a_l", "a_u", "halving_key", "chosen_key")  # in which labels that are merged may differ
FULL_PRECISION = "full_precision.json"
NOT_NUMBERS = ("row", "configuration", "images")  # what else is in a line of proxies


class Run(NamedTuple):
    """A labelling run's folder, read."""

    folder: Path
    settings: dict | None
    rows: list[dict]
    proxies: dict[int, dict]  # by number of the row, from 1

    def numbers(self):
        """A flat dict per row: all that is known of it but its configuration."""
        for number, row in enumerate(self.rows, start=1):
            proxies = self.proxies.get(number, {})
            yield {key: value for key, value in row.items() if key != "config"} | {
                key: value for key, value in proxies.items() if key not in NOT_NUMBERS
            }


def read(path):
    """The labels in a folder, or of a `quant_cache.pkl`; InputError if there are none.

    A cache alone will do: without `sampling_config.yaml` beside it nothing is known of how it was made.
    """
    cache = path if path.suffix == ".pkl" else path / "quant_cache.pkl"
    rows = quant_cache.load(cache)
    if not rows:
        raise InputError(f"{cache}: no labelled configurations; make them with *_eval_random.py --outdir {cache.parent}")
    proxies = {line["row"]: line for line in json_lines.load(cache.parent / "quant_proxies.jsonl", "row")}
    settings = cache.parent / "sampling_config.yaml"
    return Run(cache.parent, read_settings(settings) if settings.exists() else None, rows, proxies)


def read_full_precision(folder):
    """The row of full precision."""
    row = full_precision_row(folder)
    if row is None:
        raise InputError(f"{folder / FULL_PRECISION}: cannot be read; run the labelling again, it goes on")
    return row


def full_precision_row(folder):
    """The row of full precision without its configuration; None if there is none, or it is damaged."""
    try:
        row = from_json((folder / FULL_PRECISION).read_bytes())
    except OSError:
        return None
    return row if row is not None and quant_cache.is_row(row | {"config": {}}) else None


def check_mergeable(runs):
    """InputError unless all runs label the same denoiser in the same way, each from a seed of its own."""
    first = runs[0]
    for place, run in enumerate(runs[1:], start=1):
        if sizes(run) != sizes(first):
            raise InputError(f"{run.folder}: labels another denoiser than {first.folder}; labels of one go together")
        if None in (run.settings, first.settings):
            continue
        for flag in LABEL_FLAGS:
            if flag not in OWN_FLAGS and run.settings.get(flag) != first.settings.get(flag):
                raise InputError(
                    f"{run.folder}: labelled with {flag} {shown(run.settings.get(flag))}, {first.folder} with "
                    f"{shown(first.settings.get(flag))}; labels made in different ways do not compare"
                )
        for other in runs[:place]:
            if other.settings is not None and run.settings.seed == other.settings.seed:
                raise InputError(
                    f"{run.folder}: has the seed {shown(run.settings.seed)}, and so the noise, of {other.folder}"
                )


def sizes(run):
    """{key: bytes in full precision}: tells denoisers apart."""
    return {key: value[1] for key, value in run.rows[0]["config"].items()}
