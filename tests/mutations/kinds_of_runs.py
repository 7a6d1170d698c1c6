"""Files that runs write for themselves: labels, what they go on from, caches."""

import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from autobuild import predictor_file
from autobuild.training import FOLDS
from evaluation import fid, quant_cache
from models import prompt_memo
from models.embedded import judge
from mutations import mutate
from mutations.kind import Kind
from quant import checked_files
from quant.calibration import Moments, MomentsFolder
from quant.files import load_pickle, save_pickle
from quant.kernels import shapes
from stages import quantize_images, run_folder, run_lock
from stages.labelling import full_precision, json_lines, label_runs
from stages.labelling.labeller import Task
from stages.labelling.task_results import TaskResults
from stages.quantize_choice import Kept
from stages.record_file import RecordFile

RNG = np.random.default_rng(0)
ROWS = [
    {
        **{"quantized_size": 4 + number, "avg_bits": 3.5, "quantized_error": 0.5, "FID-GT-1k": 7.25, "bops": 1.0},
        "config": {f"model.{name}.weight_quantizer": ["mse-4", 16, 4, 0.5] for name in "abc"},
    }
    for number in range(3)
]
NUMBERS = {name: ROWS[0][name] for name in quant_cache.ROW_NUMBERS}
TASK = Task(7, 4, 8)
ARRAYS = {"features": RNG.normal(size=(4, 6)), "constant": np.zeros(4, bool), "psnr": RNG.random(4)}
IMAGES = RNG.integers(0, 256, (4, 3, 3, 3), np.uint8)
FULL = {"images": IMAGES, "latents": RNG.normal(size=(4, 2, 2, 2)).astype(np.float32), "features": ARRAYS["features"]}
EMBEDDINGS = [{"a" * 32: [torch.ones(1, 4), None], "b" * 32: [torch.zeros(1, 4), None]}]
PICTURES = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)
ENTRY = {"shape": (2, 2), "fingerprint": "f", "errors": {"mse-4": 0.5}, "parameters": {"mse-4": {"delta": torch.ones(2, 1)}}}
SLOT = SimpleNamespace(key="a", file_key="model.a.weight_quantizer")


def at(name, write):
    """make: `write(path)` at a name in the folder."""

    def make(folder):
        write(folder / name)
        return folder / name

    return make


def rewritten(load, save):
    """rewrite: what `load(path)` gives is changed somewhere, and written by `save(data, path)`."""

    def rewrite(path, rng):
        save(mutate.of_data(load(path), rng), path)

    return rewrite


def save_arrays(arrays, path):
    """As checked_files.save_arrays, of whatever can be made arrays."""
    checked_files.save_arrays({str(name): np.asarray(value) for name, value in dict(arrays).items()}, path)


def make_labels(folder):
    quant_cache.save(ROWS, folder / "quant_cache.pkl")
    return folder / "quant_cache.pkl"


def read_labels(path):
    """As the predictor's training reads them."""
    run = label_runs.read(path)
    return run.rows, list(run.numbers()), sorted(run.rows, key=quant_cache.by_fid)


def make_full_precision(folder):
    full_precision.save(folder / "full_precision", FULL)
    return folder / "full_precision" / "latents.npy"


def make_parts(folder):
    results = TaskResults(folder / "parts")
    results.save(TASK, ARRAYS)
    return results.path(TASK)


def make_statistics(folder):
    fid.save_arrays(fid.Reference(RNG.random(6), RNG.random((6, 6)), 9)._asdict(), folder / "x.npz")
    return folder / "x.npz"


def make_reference(folder):
    with mock.patch.object(judge, "reference_pictures", lambda: PICTURES):
        return judge.digit_reference_folder() / "0001.png"


def read_reference(path):
    """The pixels of the folder, once it was asked for."""
    with mock.patch.object(judge, "reference_pictures", lambda: PICTURES):
        folder = judge.digit_reference_folder()
    return [fid.read_rgb(file)[0] for file in sorted(folder.iterdir())]


def make_predictor(folder):
    fold = {"state": {"a": torch.ones(3)}, "test": [1, 2], "predictions": [0.5, 1.0], "metrics": {"srcc": 0.5}}
    content = {
        **{"format": predictor_file.FORMAT, "version": predictor_file.VERSION, "family": "dit", "key": "k" * 32},
        **{"told": {"target": "-1*log(FID-GT-1k)", "rows": 40}, "weights": ["model.a"], "precision_bits": 16},
        **{name: torch.ones(1, 6) for name in predictor_file.ARRAYS},
        "folds": {number: fold for number in range(FOLDS)},
    }
    checked_files.save_content(content, folder / "dit.pt")
    return folder / "dit.pt"


def read_predictor(path):
    return predictor_file.load_folds(path, "k" * 32), predictor_file._read(path)


def make_fits(folder):
    kept = Kept(folder / "fits.pt", {"bits": 16})
    kept.put("transformer", SLOT, "f", ENTRY)
    kept.save()
    return kept.path


def read_fits(path):
    return Kept(path, {"bits": 16}).get("transformer", SLOT, "f")


SETTINGS = {"probe": "exact", "calls": 5}


def make_sensitivity(folder):
    path = folder / "x_sensitivity.exact"
    with RecordFile(path, SETTINGS) as records:
        for number in range(3):
            records.add(
                [f"layer {number}"], {"changes": torch.ones(6, dtype=torch.float64), "shifts": torch.ones(6, 8).half()}
            )
    return path


def read_sensitivity(path):
    records = RecordFile(path, SETTINGS)
    return [[name, records[name]] for name in records.names]


def moments_folder(folder):
    return MomentsFolder(folder, {SLOT.key: SLOT}, "steps 5")


def make_moments(folder):
    moments_folder(folder).put(SLOT.key, Moments(torch.eye(4), torch.ones(4), 3))
    return folder / f"{SLOT.file_key}.pt"


def read_moments(path):
    moments = moments_folder(path.parent).get(SLOT.key)
    return moments and [moments.second, moments.mean, moments.count]


def make_shapes(_folder):
    shapes.save({shapes.key("linear", (9, 0), 16, 64, 64): "fused"})
    return shapes.path()


def read_shapes(_path):
    shapes.use(None)
    return shapes.choose("linear", (9, 0), 16, 64, 64)


def make_holder(folder):
    holder = {"process": 2**22 + 1, "host": run_lock.socket.gethostname(), "started": 1.5}
    (folder / run_lock.PID).write_text(json.dumps(holder))
    return folder / run_lock.PID


def read_holder(path):
    """As a run does that finds the folder held: whose process is gone, it removes."""
    text = path.read_bytes()
    try:
        run_lock._remove_if_left(path)
    finally:
        path.write_bytes(text)


SETTINGS = {"seed": 42, "model_id": "embedded", "steps": 5, "lora": ["a.safetensors"], "a_l": 0.0, "prompts": None}
LINES = [{"row": number, "configuration": number, "images": 12, "ssim": 0.5, "psnr": None} for number in (1, 2, 3)]
RUNS = (
    Kind(
        "labels",
        make_labels,
        read_labels,
        ("evaluation.quant_cache.load",),
        rewrite=rewritten(load_pickle, save_pickle),
        count=300,
    ),
    Kind(
        "settings",
        at("sampling_config.yaml", lambda path: run_folder.save_settings(SETTINGS, path)),
        run_folder.read_settings,
        ("stages.run_folder.read_settings",),
    ),
    Kind(
        "lines of proxies",
        at("quant_proxies.jsonl", lambda path: json_lines.save(LINES, path)),
        lambda path: json_lines.load(path, "row"),
        ("stages.labelling.json_lines.load", "quant.checked_files.from_json"),
        has_digest=True,
        mutate=lambda content, rng: rng.choice((mutate.of_bytes, mutate.of_json))(content, rng),
        count=300,
    ),
    Kind(
        "full precision's row",
        at(
            "full_precision.json",
            lambda path: path.write_text(json.dumps(checked_files.with_digest(NUMBERS), indent=1)),
        ),
        lambda path: label_runs.full_precision_row(path.parent),
        ("stages.labelling.label_runs.full_precision_row",),
        has_digest=True,
        mutate=lambda content, rng: rng.choice((mutate.of_bytes, mutate.of_json))(content, rng),
        count=300,
    ),
    Kind(
        "full precision's images",
        make_full_precision,
        lambda path: full_precision.load(path.parent, 4),
        ("stages.labelling.full_precision.load", "quant.checked_files.read", "quant.checked_files._array"),
        has_digest=True,
        beside=lambda path: sorted(path.parent.iterdir()),
        count=300,
    ),
    Kind(
        "parts",
        make_parts,
        lambda path: TaskResults(path.parent).load(TASK),
        ("stages.labelling.task_results.load", "quant.checked_files.load_arrays"),
        has_digest=True,
        rewrite=rewritten(checked_files.load_arrays, save_arrays),
        count=300,
    ),
    Kind(
        "prompt embeddings",
        at("prompt_embeddings.pt", lambda path: prompt_memo.save(EMBEDDINGS, path, "key")),
        lambda path: prompt_memo.load(path, "key"),
        ("models.prompt_memo.load", "quant.checked_files.load_content"),
        has_digest=True,
        rewrite=rewritten(checked_files.load_content, checked_files.save_content),
    ),
    Kind(
        "statistics of a reference",
        make_statistics,
        fid._cached_statistics,
        ("evaluation.fid._cached_statistics",),
        has_digest=True,
        rewrite=rewritten(checked_files.load_arrays, save_arrays),
    ),
    Kind(
        "digits of the reference",
        make_reference,
        read_reference,
        ("models.embedded.judge._is_picture",),
        has_digest=True,
        count=100,
    ),
    Kind(
        "predictor",
        make_predictor,
        read_predictor,
        ("autobuild.predictor_file._read", "autobuild.predictor_file.load_folds"),
        has_digest=True,
        rewrite=rewritten(checked_files.load_content, checked_files.save_content),
    ),
    Kind(
        "fits",
        make_fits,
        read_fits,
        ("stages.quantize_choice._read",),
        has_digest=True,
        rewrite=rewritten(checked_files.load_content, checked_files.save_content),
    ),
    Kind(
        "sensitivities",
        make_sensitivity,
        read_sensitivity,
        (
            *("stages.record_file._scan", "stages.record_file.__getitem__", "stages.record_file.__enter__"),
            *("stages.record_file._name_of", "stages.record_file.names"),
        ),
        has_digest=True,
        beside=lambda path: [path],
    ),
    Kind(
        "moments of inputs",
        make_moments,
        read_moments,
        ("quant.calibration._read",),
        has_digest=True,
        rewrite=rewritten(checked_files.load_content, checked_files.save_content),
    ),
    Kind("shapes on a GPU", make_shapes, read_shapes, ("quant.kernels.shapes.load",), mutate=mutate.of_json),
    Kind("holder of a folder", make_holder, read_holder, ("stages.run_lock._read", "stages.run_lock._holder")),
    Kind(
        "settings of pictures",
        at("settings.json", lambda path: path.write_text('{"steps": 5}')),
        lambda path: quantize_images.prepared(path.parent, 2, '{"steps": 5}'),
        ("stages.quantize_images.prepared",),
    ),
)
