"""Files that people make: prompts, images, configurations. What they mean nobody can check."""

import functools
import json

import numpy as np
from PIL import Image

from evaluation.image_folder import read_rgb
from mutations import mutate
from mutations.kind import Kind
from mutations.kinds_of_models import small_model
from mutations.kinds_of_runs import at, make_labels, rewritten
from quant.files import load_pickle, save_pickle
from stages import prompt_files, q_config
from stages.pictures import is_whole
from stages.quantize_images import opened

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
COCO = {"images": [], "annotations": [{"image_id": number, "caption": f"a red {number}"} for number in range(4)]}
KARPATHY = {"images": [{"split": "test", "sentences": [{"raw": "a red seven"}, {"raw": "a seven"}]} for _ in range(3)]}
TABLE = 'name,prompt\na,a red seven\nb,"two, blue"\nc,three\n'


def text(name, content):
    return at(name, lambda path: path.write_text(content))


def image(name, **settings):
    return at(name, lambda path: Image.fromarray(PIXELS).save(path, **settings))


def prompts(name, content, **more):
    """A kind of file of prompts."""
    return Kind(
        f"prompts in {name}",
        text(name, content),
        lambda path: prompt_files.load(path, 3),
        (
            *("stages.prompt_files._read_text", "stages.prompt_json._parsed", "stages.prompt_tables._read"),
            "stages.prompt_tables._header",
        ),
        **more,
    )


@functools.cache
def slots():
    return small_model().slots


def make_configuration(folder):
    save_pickle({slot.file_key: "kmeans-4" for slot in slots().values()}, folder / "config.pkl")
    return folder / "config.pkl"


def read_configuration(path):
    """As --q_config is read before any model is."""
    return q_config.load(str(path), slots())


def read_row(path):
    return q_config._from_file(f"{path}:best")


USERS = (
    Kind(
        "configuration",
        make_configuration,
        read_configuration,
        ("quant.files.load_pickle", "stages.q_config._from_file", "quant.config.read_file", "stages.q_config.key"),
        rewrite=rewritten(load_pickle, save_pickle),
    ),
    Kind("row of labels", make_labels, read_row, (), rewrite=rewritten(load_pickle, save_pickle)),
    prompts("prompts.txt", "a red seven\n# not this\ntwo, blue\n"),
    prompts("prompts.csv", TABLE),
    prompts("prompts.tsv", TABLE.replace(",", "\t")),
    prompts("captions.json", json.dumps(COCO), mutate=mutate.of_json),
    prompts("karpathy.json", json.dumps(KARPATHY), mutate=mutate.of_json),
    prompts("list.json", json.dumps(["a red seven", {"prompt": "two"}]), mutate=mutate.of_json),
    prompts("prompts.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n', mutate=mutate.of_json),
    *(
        Kind(f"image in {name}", image(name), read_rgb, ("evaluation.image_folder.read_rgb", "evaluation.fid._pictures"))
        for name in ("x.png", "x.jpg", "x.webp", "x.gif", "x.bmp", "x.tif", "x.ppm")
    ),
    Kind("picture that was drawn", image("000.png"), is_whole, ("stages.pictures.is_whole",)),
    Kind(
        "picture of a call",
        image("photo.png"),
        lambda path: np.asarray(opened("image", str(path))),
        ("stages.quantize_images.opened",),
    ),
)
