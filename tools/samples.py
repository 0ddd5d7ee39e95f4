"""Draw pocket's contact sheet, `assets/pocket/samples.png`: `python tools/samples.py`.

The prompts were fixed before the first picture was seen, every picture starts from seed 0, none was left out.
Steps and guidance are those of pocket's `fusion.toml`.
"""

import textwrap
import tomllib
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

POCKET = Path(__file__).resolve().parents[1] / "assets" / "pocket"
PROMPTS = (
    "a dog face on a blue background",
    "a red apple on a white background",
    "a penguin on a orange background",
    "a sailboat on a yellow background",
    "a rose on a black background",
    "a hamburger on a purple background",
    "a blob style cat face on a green background",
    "a glossy style fox on a grey background",
    "a flat style rocket on a black background",
    "a fox style guitar on a pink background",
    "a tweet style turtle on a brown background",
    "a joy style pig face on a teal background",
    "a glossy style birthday cake on a pink background",
    "a flat style tiger face on a red background",
    "an umbrella",
    "a tweet style sunflower on a blue background",
    "a cat face on the left and a banana on the right on a white background",
    "a bear on the left and a balloon on the right on a yellow background",
    "a glossy style strawberry on the left and a glossy style lemon on the right on a teal background",
    "a ghost and a skull on a purple background",
    "a house on the left and a palm tree on the right on a green background",
    "a blob style frog on the left and a flat style crown on the right on a orange background",
    "a joy style bus on the left and a tweet style bicycle on the right on a grey background",
    "a panda on the left and a panda on the right on a red background",
)
COLUMNS = 6
SIDE, CAPTION, GAP = 128, 74, 12  # px
LETTERS = 24  # in a line of a caption


def main() -> None:
    settings = tomllib.loads((POCKET / "fusion.toml").read_text(encoding="utf-8"))["generation"]
    pipe = StableDiffusionPipeline.from_pretrained(POCKET, torch_dtype=torch.float32)
    pictures = pipe(
        list(PROMPTS),
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        guidance_rescale=settings["guidance_rescale"],
        generator=[torch.Generator().manual_seed(0) for _ in PROMPTS],
    ).images
    sheet(pictures).save(POCKET / "samples.png", optimize=True)


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """All pictures in rows, each above its prompt."""
    width, height = SIDE + GAP, SIDE + CAPTION
    page = Image.new("RGB", (COLUMNS * width + GAP, -(-len(pictures) // COLUMNS) * height + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for number, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        x, y = GAP + number % COLUMNS * width, GAP + number // COLUMNS * height
        page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + SIDE + 4), "\n".join(textwrap.wrap(prompt, LETTERS)), "#333333", font, spacing=2)
    return page


if __name__ == "__main__":
    main()
