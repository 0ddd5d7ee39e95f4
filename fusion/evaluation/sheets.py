"""Pictures with words under them on one sheet."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, INK, PAPER = 12, "#1c1917", "#ffffff"
SMALLEST = 192  # pixels; smaller pictures are enlarged in whole steps, in crisp squares


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Rows of pictures of about one size, each with its text under it; short rows leave room on the right."""
    first = rows[0][0][0]
    times = max(1, -(-SMALLEST // max(first.size)))
    wide, high = first.width * times, first.height * times
    font = ImageFont.load_default(13)
    texts = [[_wrapped(text, wide, font) for _, text in row] for row in rows]
    heights = [high + 18 * max(text.count("\n") + 1 for text in row) + 2 * GAP for row in texts]
    columns = max(map(len, rows))
    page = Image.new("RGB", (GAP + columns * (wide + GAP), GAP + sum(heights)), PAPER)
    pen, top = ImageDraw.Draw(page), GAP
    for row, words, height in zip(rows, texts, heights, strict=True):
        for column, ((image, _), text) in enumerate(zip(row, words, strict=True)):
            left = GAP + column * (wide + GAP)
            page.paste(image.convert("RGB").resize((wide, high), Image.Resampling.NEAREST), (left, top))
            pen.multiline_text((left, top + high + 4), text, fill=INK, font=font, spacing=4)
        top += height
    return page


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    letters = max(8, int(width / font.getlength("n")))
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, letters) or [""])
