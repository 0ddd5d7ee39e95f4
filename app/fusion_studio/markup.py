"""Values as HTML. Text from people and files is escaped here, and nowhere else."""

import base64
import html
from collections.abc import Mapping, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from fusion_studio.session import tokens_of

THUMBNAIL = 192  # pixels
WIDTH, HEIGHT = 600, 120  # of the loss plot
VERDICTS = {"compatible": "Compatible", "caution": "Caution", "refused": "Cannot be combined"}
MAX_OWNERS, MAX_PARTS = 200, 2000  # shown in the map of slices
MAX_NAMES, MAX_LENGTH = 12, 200  # tokens, slices or nouns of one adapter that are listed; letters of each
COLOURS = ("#7c3aed", "#0d9488", "#d97706", "#db2777", "#2563eb", "#65a30d", "#0891b2", "#9333ea")

escape = html.escape


def shortened(texts: Sequence[str]) -> list[str]:
    """Texts from a file, as many and as long as a page can show; the file may hold any number."""
    more = [f"and {len(texts) - MAX_NAMES} more"] if len(texts) > MAX_NAMES else []
    return [text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} …" for text in texts[:MAX_NAMES]] + more


def hint(text: object) -> str:
    return f'<p class="hint" role="status">{escape(str(text))}</p>'


def empty(title: str, text: str) -> str:
    return f'<div class="empty"><h3>{escape(title)}</h3><p>{escape(text)}</p></div>'


def bar(step: float, total: float, text: str = "") -> str:
    share = 100 * step / max(1, total)
    progress = f'role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100"'
    return f'<div class="bar" {progress}><i style="width:{share:.1f}%"></i></div>{hint(text) if text else ""}'


def data_url(image: Image.Image, side: int | None = THUMBNAIL, form: str = "PNG") -> str:
    """A picture as text inside the page, so that no folder is opened to visitors."""
    copy, data = image.convert("RGB"), BytesIO()
    if side:
        copy.thumbnail((side, side))
    copy.save(data, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def picture_beside(adapter: Path, side: int = THUMBNAIL) -> str | None:
    """The picture that lies beside an adapter's file, as a data URL."""
    for path in (adapter.with_suffix(suffix) for suffix in (".png", ".jpg", ".webp")):
        try:
            with Image.open(path) as image:
                return data_url(image, side)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return None


def verdict(report: Any) -> str:
    """The sentence of a compatibility report, with further problems and advice under it."""
    more = "".join(f"<p>{escape(text)}</p>" for text in [*report.problems[1:], *report.advice])
    sentence = f"<b>{VERDICTS[report.verdict]}</b> {escape(report.sentence)}"
    return f'<div class="verdict {report.verdict}" role="status">{sentence}{more}</div>'


def heat_map(report: Any) -> str:
    """Cosines between the changes of adapters, as a table of numbers with coloured cells."""
    names, interference = report.names, report.interference
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in names)
    rows = ""
    for i, name in enumerate(names):
        cells = "".join(_heat(value, diagonal=i == j) for j, value in enumerate(interference.cosine[i]))
        rows += f"<tr><th scope=row>{escape(name)}</th>{cells}<td>{interference.retention[i]:.0%}</td></tr>"
    legend = (
        "How much two adapters change the same thing in the same way: 0 independent, +1 alike, −1 opposed. "
        "In the sum: how much of each remains in the sum of all, 100% unchanged."
    )
    table = f"<table><thead><tr><td></td>{head}<th scope=col>in the sum</th></tr></thead><tbody>{rows}</tbody></table>"
    return f'<figure class="heat">{table}<figcaption>{legend}</figcaption></figure>'


def _heat(value: float, *, diagonal: bool) -> str:
    if diagonal:
        return '<td class="own">1</td>'
    share, colour = min(1.0, abs(value) / 0.3), "217, 119, 6" if value > 0 else "37, 99, 235"
    return f'<td style="background: rgba({colour}, {0.75 * share:.2f})">{value:+.2f}</td>'


def card(entry: Any, *, chosen: bool = False) -> str:
    """An adapter of the library: picture, token, noun, base, slice, size, date, how it was trained."""
    info, key = entry.info, entry.path.stem
    tokens = shortened(tokens_of(info))
    nouns = ", ".join(shortened([concept.noun for concept in info.concepts if concept.noun]))
    url = picture_beside(entry.path)
    initial = escape((tokens[0].strip("<>") if tokens else key)[:1])
    image = f'<img alt="" src="{url}">' if url else f'<span class="initial" aria-hidden="true">{initial}</span>'
    facts = [*shortened([info.base.name if info.base else "base unknown"]), size_of(entry.size)]
    if entry.slices:
        facts.insert(1, f"slice {', '.join(shortened([str(part) for part in entry.slices]))}")
    origin, date = info.provenance, datetime.fromtimestamp(entry.path.stat().st_mtime)
    how = f"{origin.steps} steps" if origin.steps else "fused" if origin.parents else "imported"
    facts += [f"{how}, {date:%-d %b %Y}"]
    title = f"<h3>{escape(' '.join(tokens) or key)}</h3><p>{escape(nouns or key)}</p>"
    small = f"<small>{escape(' · '.join(facts))}</small>"
    pressed = str(chosen).lower()
    return (
        f'<button type="button" class="card" data-key="{escape(key)}" aria-pressed="{pressed}">'
        f"{image}{title}{small}</button>"
    )


def facts(rows: Mapping[str, str]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value)
    return f'<dl class="facts">{lines}</dl>'


def size_of(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def slice_map(slices: Any) -> str:
    """The spectrum of a base as a strip: which adapter owns which directions, and how many are free."""
    strip, legend, parts = "", "", 0
    for number, owner in enumerate(slices.owners[:MAX_OWNERS]):
        colour, part = COLOURS[number % len(COLOURS)], owner.slice
        (name,) = shortened([owner.owner])
        starts, width = (part.indices, 1) if part.step > 1 else ((part.start,), part.rank)
        for index in starts[: MAX_PARTS - parts]:
            parts += 1
            sides = f"left:{100 * index / slices.capacity:.3f}%;width:{100 * width / slices.capacity:.3f}%"
            strip += f'<i style="{sides};background:{colour}" title="{escape(name)}: {part}"></i>'
        legend += f'<li><b style="background:{colour}"></b>{escape(name)} <small>{part}</small></li>'
    if others := slices.owners[MAX_OWNERS:]:
        legend += f"<li>and {len(others)} more</li>"
    free = f"{slices.free} of {slices.capacity} directions are free"
    title = f"<h3>Slices of {escape(slices.base.name)} <small>{free}</small></h3>"
    ends = f"<small>strongest</small><small>weakest</small><small hidden>{slices.capacity}</small>"
    return (
        f'<section class="slices">{title}<div class="strip" role="img" aria-label="{free}">{strip}</div>'
        f'<div class="ends">{ends}</div><ul>{legend}</ul></section>'
    )


def loss_svg(losses: Sequence[float], total: int) -> str:
    """The loss and its running mean, as an SVG that follows the page's theme and does not flicker."""
    means = list(losses[:1])
    for value in losses[1:]:
        means.append(means[-1] + max(0.08, 1 / (len(means) + 1)) * (value - means[-1]))
    across, down = WIDTH / max(1, total - 1), HEIGHT / (1.05 * max(losses, default=1.0) or 1.0)
    lines = ""
    for name, values in (("raw", losses), ("mean", means)):
        steps = range(0, len(values), max(1, len(values) // WIDTH))
        points = " ".join(f"{across * i:.1f},{HEIGHT - down * values[i]:.1f}" for i in steps)
        lines += f'<polyline class="{name}" points="{points}"/>'
    figure = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{lines}</svg>'
    return f'<figure class="loss"><figcaption>Loss <b>{means[-1] if means else 0:.3f}</b></figcaption>{figure}</figure>'


def pictures_row(title: str, images: Sequence[Image.Image]) -> str:
    pictures = "".join(f'<img alt="{escape(title)} {i}" src="{data_url(im)}">' for i, im in enumerate(images, start=1))
    return f'<figure class="row"><figcaption>{escape(title)}</figcaption><div>{pictures}</div></figure>'


def in_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def time_left(seconds: float | None) -> str:
    return "…" if seconds is None else f"about {in_time(seconds)} left"
