"""A contact sheet: rows of images under captions, the same noise below itself."""

import math

from PIL import Image, ImageDraw, ImageFont

GAP_PX = 6
CELL_PX = 128  # smaller images are enlarged to about this
CAPTION_PX = 18
CAPTION_WIDTH_PX = 1000  # of a sheet whose images take less; longer captions are cut
COLUMNS = 10
MOST_IMAGES = 100  # of a row: no one looks at more
MOST_PIXELS = 40_000_000  # of all images: larger ones are made smaller, not many more than viewers open


def contact_sheet(rows):
    """A picture of `rows`, a list of (caption, paths of image files), all with one number of images of one size.

    More than ten images go on in a further band of the same rows below, those beyond MOST_IMAGES are left out. A file that
    is not there leaves an empty frame. None if no file is there.
    """
    shown = [(_caption(caption, len(paths)), paths[:MOST_IMAGES]) for caption, paths in rows]
    count = len(shown[0][1])
    columns = min(count, COLUMNS)
    bands = -(-count // columns)
    first = next((path for _, paths in shown for path in paths if path.is_file()), None)
    if first is None:
        return None
    cell_w, cell_h = cell_size(Image.open(first).size, columns * bands * len(shown))
    row_h = CAPTION_PX + 2 * GAP_PX + cell_h
    images_w = columns * (cell_w + GAP_PX) + GAP_PX
    font = ImageFont.load_default(CAPTION_PX)
    captions = [fitted(caption, font, max(images_w, CAPTION_WIDTH_PX) - 2 * GAP_PX) for caption, _ in shown]
    sheet_w = max(images_w, *(math.ceil(font.getlength(caption)) + 2 * GAP_PX for caption in captions))
    sheet = Image.new("RGB", (sheet_w, bands * len(shown) * row_h + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for band in range(bands):
        for line, (_, paths) in enumerate(shown):
            top = (band * len(shown) + line) * row_h + GAP_PX
            pen.text((GAP_PX, top - 2), captions[line], fill="black", font=font)
            for column, path in enumerate(paths[band * columns : (band + 1) * columns]):
                left = GAP_PX + column * (cell_w + GAP_PX)
                _draw_cell(sheet, pen, path, (left, top + CAPTION_PX + GAP_PX, cell_w, cell_h))
    return sheet


def cell_size(image_size, count):
    """Width and height in pixels that each of `count` images of a size (width, height) is drawn with."""
    width, height = image_size
    scale = max(1, CELL_PX // width)
    scale *= min(1, math.sqrt(MOST_PIXELS / (count * width * height * scale**2)))
    return max(1, int(width * scale)), max(1, int(height * scale))


def fitted(text, font, width_px):
    """The text in one line of at most so many pixels, cut where it is longer; what cannot be shown is a question mark."""
    text = "".join(sign if sign.isprintable() else " " if sign.isspace() else "?" for sign in text)
    if font.getlength(text) <= width_px:
        return text
    kept = len(text)
    while kept and font.getlength(text[:kept] + "...") > width_px:
        kept = min(kept - 1, int(kept * width_px / font.getlength(text[:kept] + "...")))
    return text[:kept] + "..."


def _caption(caption, count):
    return caption if count <= MOST_IMAGES else f"first {MOST_IMAGES} of {count}: {caption}"


def _draw_cell(sheet, pen, path, box):
    left, top, width, height = box
    if not path.is_file():
        pen.rectangle((left, top, left + width - 1, top + height - 1), outline="grey")
        return
    with Image.open(path) as image:
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (left, top))
