import numpy as np
import pytest
from PIL import ImageFont

from evaluation import contact_sheet as sheets
from evaluation.contact_sheet import cell_size, contact_sheet, fitted
from quant.files import save_png

FONT = ImageFont.load_default(sheets.CAPTION_PX)


@pytest.fixture
def row(tmp_path):
    """A function that writes images and gives their paths."""

    def make(images):
        paths = [tmp_path / f"{place:04d}.png" for place in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            save_png(image, path)
        return paths

    return make


def reds(count, height=64, width=64):
    """Images whose red is their own."""
    images = np.zeros((count, height, width, 3), np.uint8)
    images[:, :, :, 0] = np.arange(count)[:, None, None] % 12 * 20 + 5
    return images


def test_it_holds_every_image(row):
    paths = row(reds(12))
    sheet = np.asarray(contact_sheet([("above", paths), ("below", paths)]))
    for red in range(5, 245, 20):
        assert (sheet == (red, 0, 0)).all(axis=2).sum() == 2 * 128 * 128  # enlarged twice


def test_missing_images_are_empty_frames(row):
    paths = row(reds(3))
    paths[1].unlink()
    sheet = np.asarray(contact_sheet([("row", paths)]))
    assert not (sheet == (25, 0, 0)).all(axis=2).any() and (sheet == (128, 128, 128)).all(axis=2).sum() >= 4 * 128 - 4
    paths[0].unlink(), paths[2].unlink()
    assert contact_sheet([("row", paths)]) is None


def test_a_thousand_images_do_not_make_it_explode(row, monkeypatch):
    (path,) = row(reds(1))
    sheet = contact_sheet([("many", [path] * 1000)])
    assert sheet.size[1] <= 10 * (128 + 40) and sheet.size[0] <= 10 * (128 + 10)
    drawn = []
    monkeypatch.setattr(sheets, "fitted", lambda text, *_: drawn.append(text) or text)
    contact_sheet([("many", [path] * 1000)])
    assert drawn == ["first 100 of 1000: many"]


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (2048, 512), (4096, 4096), (64, 64)])
@pytest.mark.parametrize("count", [1, 20, 200])
def test_large_images_are_made_smaller(size, count):
    width, height = cell_size(size, count)
    assert count * width * height <= sheets.MOST_PIXELS
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
    if count * size[0] * size[1] * 4 <= sheets.MOST_PIXELS:
        assert width >= min(size[0], 128) and width % size[0] == 0  # of its own size, or whole times it


def test_images_that_are_not_square(row):
    sheet = np.asarray(contact_sheet([("wide", row(reds(2, height=48, width=96)))]))
    assert (sheet == (25, 0, 0)).all(axis=2).sum() == 48 * 96


@pytest.mark.parametrize(
    "text",
    ["two\nlines", "\udc80\ud800", "zwölf Löwen", "獅子が自転車に乗る", "🦁🚲", "\0\x1b[0m", "", "a " * 5000, "m" * 5000],
)
def test_any_caption_is_drawn(row, text):
    line = fitted(text, FONT, 300)
    assert "\n" not in line and FONT.getlength(line) <= 300
    assert contact_sheet([(text, row(reds(1)))]).size[0] <= sheets.CAPTION_WIDTH_PX


def test_captions_are_cut_where_they_are_too_long():
    assert fitted("short", FONT, 300) == "short"
    line = fitted("uniform:" + "abc" * 100, FONT, 300)
    assert line.startswith("uniform:abc") and line.endswith("...") and FONT.getlength(line) > 250
