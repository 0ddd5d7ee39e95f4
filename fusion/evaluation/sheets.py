"""Pictures with captions on one sheet."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fusion.formats.picture_file import as_picture

GAP, INK, PAPER = 12, "#1c1917", "#ffffff"
MIN_SIDE = 192  # pixels; smaller pictures are enlarged in whole steps, in sharp squares


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Rows of pictures of one size, each with its text under it; short rows end early."""
    first = rows[0][0][0]
    scale = max(1, -(-MIN_SIDE // max(first.size)))
    width, height = first.width * scale, first.height * scale
    font = ImageFont.load_default(13)
    texts = [[_wrap(text, width, font) for _, text in row] for row in rows]
    row_heights = [height + 18 * max(text.count("\n") + 1 for text in row) + 2 * GAP for row in texts]
    columns = max(map(len, rows))
    page = Image.new("RGB", (GAP + columns * (width + GAP), GAP + sum(row_heights)), PAPER)
    pen, top = ImageDraw.Draw(page), GAP
    for row, row_texts, row_height in zip(rows, texts, row_heights, strict=True):
        for column, ((image, _), text) in enumerate(zip(row, row_texts, strict=True)):
            left = GAP + column * (width + GAP)
            page.paste(as_picture(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
            pen.multiline_text((left, top + height + 4), text, fill=INK, font=font, spacing=4)
        top += row_height
    return page


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    letters = max(8, int(width / font.getlength("n")))
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, letters) or [""])
