"""A contact sheet: rows of images under captions, the same noise below itself."""

from PIL import Image, ImageDraw, ImageFont

GAP_PX = 6
CELL_PX = 128  # smaller images are enlarged to about this
CAPTION_PX = 18
COLUMNS = 10


def contact_sheet(rows):
    """A picture of `rows`, a list of (caption, images uint8 [N, H, W, 3]) with one N.

    More than ten images go on in a further band of the same rows below.
    """
    height, width = rows[0][1].shape[1:3]
    scale = max(1, CELL_PX // width)
    cell_w, cell_h = width * scale, height * scale
    count = len(rows[0][1])
    columns = min(count, COLUMNS)
    bands = -(-count // columns)
    row_h = CAPTION_PX + 2 * GAP_PX + cell_h
    font = ImageFont.load_default(CAPTION_PX)
    text_w = max(int(font.getlength(caption)) for caption, _ in rows)
    sheet_w = max(columns * (cell_w + GAP_PX), text_w + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (sheet_w, bands * len(rows) * row_h + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for band in range(bands):
        for line, (caption, images) in enumerate(rows):
            top = (band * len(rows) + line) * row_h + GAP_PX
            pen.text((GAP_PX, top - 2), caption, fill="black", font=font)
            for column, image in enumerate(images[band * columns : (band + 1) * columns]):
                cell = Image.fromarray(image).resize((cell_w, cell_h), Image.Resampling.BICUBIC)
                sheet.paste(cell, (GAP_PX + column * (cell_w + GAP_PX), top + CAPTION_PX + GAP_PX))
    return sheet
