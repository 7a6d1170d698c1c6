"""A picture of all six embedded models at full precision, 4 and 3 bits: `python -m benchmarks.gallery`.

Writes assets/gallery.png: a line per model, the same prompts (digits, for DiT) and noise under three
headings, all weights under K-Means-C at 4 and UAQ at 3 bits.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.embedded_quality import make_pictures, prompts_and_answers
from models.families import FAMILIES
from models.pipelines import Extras, load_sampler, refiner_of
from quant.model import QuantizedModel

COLUMNS = (("full precision", None), ("4 bits (K-Means-C)", "kmeans-4"), ("3 bits (UAQ)", "mse-3"))
PICTURES = 5  # per model and column
CELL_PX, GAP_PX, NAME_PX, HEAD_PX = 64, 4, 150, 28


def pictures_of(family):
    """uint8 [columns, PICTURES, 64, 64, 3] of the family's embedded model."""
    sampler = load_sampler(family, "embedded", torch.device("cpu"), Extras(refiner_of(family, "embedded")))
    prompts, _ = prompts_and_answers(family, PICTURES, PICTURES)
    model = QuantizedModel(sampler.denoiser, **family.quantization)
    columns = []
    for _, method in COLUMNS:
        model.apply(method) if method else model.restore()
        columns.append(make_pictures(sampler, prompts, seed=0, guidance=family.embedded.guidance))
    return np.stack(columns)


def draw(rows):
    """The picture of `rows`, a list of (name, pictures [columns, PICTURES, H, W, 3])."""
    column_px = PICTURES * (CELL_PX + GAP_PX) + 4 * GAP_PX
    size = (NAME_PX + len(COLUMNS) * column_px, HEAD_PX + len(rows) * (CELL_PX + GAP_PX))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, (heading, _) in enumerate(COLUMNS):
        pen.text((NAME_PX + column * column_px, GAP_PX), heading, fill="black", font=font)
    for line, (name, pictures) in enumerate(rows):
        top = HEAD_PX + line * (CELL_PX + GAP_PX)
        pen.text((GAP_PX, top + CELL_PX // 3), name, fill="black", font=font)
        for column, row in enumerate(pictures):
            for place, picture in enumerate(row):
                left = NAME_PX + column * column_px + place * (CELL_PX + GAP_PX)
                sheet.paste(Image.fromarray(picture), (left, top))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/gallery.png"))
    args = parser.parse_args()
    sheet = draw([(family.title, pictures_of(family)) for family in FAMILIES.values()])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
