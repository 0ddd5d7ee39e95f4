"""Stage `card`: the folders as they are shipped, each with its model card and the numbers that were measured."""

import json
import shutil
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.pocket import prompts, subjects
from tools.pocket.evaluate import GUIDANCE, RESCALE, STEPS, Bench

COLUMNS, ROW, CAPTION = 10, 130, 44
TEXTS = Path(__file__).parent / "cards"
SETTINGS = f"""# What suits this base. Used wherever the user has not set a value.

[training]
rank = 8
num_vectors = 3  # one is enough for a word the base nearly knows, three draw pairs visibly better
learning_rate = 3e-3
text_encoder_lr = 3e-3
token_lr = 5e-3
max_train_steps = 300
train_batch_size = 6
lr_scheduler = "linear"
lr_warmup_steps = 0
mixed_precision = "no"  # "bf16" is faster, but only on processors with bfloat16 instructions
resolution = 128
quiet_loss_weight = 10.0  # exports, which have no gates, then disturb little, and pairs are drawn better

[generation]
steps = {STEPS}
guidance_scale = {GUIDANCE}
guidance_rescale = {RESCALE}
"""


def run(work: Path, *, sheet: bool) -> None:
    bench = Bench(work)
    results = json.loads((work / "evaluation" / "results.json").read_text(encoding="utf-8"))
    parts = {"pocket": results, "pocket-clip": {"judges": results["judges"]}}
    for source, name in (("denoiser/pipeline", "pocket"), ("judge/final", "pocket-clip")):
        folder = work / "assets" / name
        shutil.copytree(work / source, folder, dirs_exist_ok=True)
        text = (TEXTS / f"{name}.md").read_text(encoding="utf-8")
        for mark, value in {"SUBJECTS": words(bench), "FIGURES": figures(parts[name])}.items():
            text = text.replace(f"<!-- {mark} -->", value)
        (folder / "README.md").write_text(text, encoding="utf-8")
    (work / "assets" / "pocket" / "fusion.toml").write_text(SETTINGS, encoding="utf-8")
    if sheet:
        contact_sheet(bench).save(work / "assets" / "pocket" / "samples.png", optimize=True)
    print(f"ready to be copied: {work / 'assets'}")


def words(bench: Bench) -> str:
    """The subjects as one types them; a star where a style lacks it."""
    labels = {sprite.subject: sprite.label for sprite in bench.index}
    has = {(sprite.subject, sprite.style) for sprite in bench.index}
    plenty = [style for style in subjects.STYLES if style != subjects.HELD_OUT_STYLE]
    return ", ".join(
        labels[name] + ("" if all((name, style) in has for style in plenty) else "\\*") for name in subjects.TRAINED
    )


def figures(results: dict) -> str:
    """All results as one table: part, what, number."""
    rows = ["| part | what | measured |", "|---|---|---|"]
    for part, entries in results.items():
        for what, value in flat(entries):
            rows.append(f"| {part} | {what.replace('_', ' ')} | {value} |")
    return "\n".join(rows)


def flat(entries: dict) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in entries.items():
        if isinstance(value, dict):
            found += [(f"{key}, {inner}", number) for inner, number in flat(value)]
        else:
            found.append((key, value))
    return found


def contact_sheet(bench: Bench) -> Image.Image:
    """100 prompts that were fixed before, none left out, each above its words."""
    asked = prompts.contact_sheet(bench.palette)
    sheet = Image.new("RGB", (COLUMNS * ROW, -(-len(asked) // COLUMNS) * (ROW + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(8)
    for k, (image, prompt) in enumerate(zip(bench.draw(bench.pipeline(), asked), asked, strict=True)):
        x, y = k % COLUMNS * ROW, k // COLUMNS * (ROW + CAPTION)
        sheet.paste(image, (x + 1, y))
        lines = textwrap.wrap(prompt or "(an empty prompt)", 30)[:4]
        pen.multiline_text((x + 2, y + 129), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet
