"""Parts of the picture with prompts of their own: from the value of the page's widget to `fusion.Region`s."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import base64
import binascii
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

import fusion

MAX_REGIONS = 12
MAX_MASK_LENGTH = 300_000  # letters of a painted mask
MAX_MASK_SIDE = 1024  # pixels of a painted mask, at most
DATA_URL = "data:image/png;base64,"


def regions_of(value: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What widgets/regions.js holds, checked: every region has a prompt, and a box or a mask."""
    entries: Any = (value or {}).get("regions") or []
    if not isinstance(entries, list) or not all(isinstance(region, Mapping) for region in entries):
        raise fusion.FusionError("The regions cannot be read; draw them again.")
    if len(entries) > MAX_REGIONS:
        raise fusion.FusionError(f"{len(entries)} regions are too many; {MAX_REGIONS} is the limit.")
    regions: list[dict[str, Any]] = []
    for number, region in enumerate(entries, start=1):
        prompt, box, mask = str(region.get("prompt") or "").strip(), region.get("box"), region.get("mask")
        if not prompt:
            raise fusion.FusionError(f"Region {number} has no prompt; say what is there, or remove it.")
        if box:
            regions.append({"prompt": prompt, "box": _box(box, number)})
        elif mask:
            regions.append({"prompt": prompt, "mask": str(mask)})
        else:
            raise fusion.FusionError(f"Nothing is painted in region {number}; paint it, or remove it.")
    return regions


def _box(shares: Any, number: int) -> tuple[float, ...]:
    try:
        return tuple(min(1.0, max(0.0, float(share))) for share in shares)
    except (TypeError, ValueError, OverflowError):
        raise fusion.FusionError(f"The box of region {number} cannot be read; draw it again.") from None


def as_regions(regions: Sequence[Mapping[str, Any]]) -> list[Any]:
    """`fusion.Region`s, masks decoded."""
    return [
        fusion.Region(part["prompt"], part["box"])
        if "box" in part
        else fusion.Region(part["prompt"], mask=_mask(part["mask"], number))
        for number, part in enumerate(regions, start=1)
    ]


def as_entry(region: fusion.Region) -> dict[str, Any]:
    """A region as the page's widget has it."""
    entry = region.to_json()
    return entry | {"mask": DATA_URL + entry["mask"]} if "mask" in entry else entry


def _mask(url: str, number: int) -> Image.Image:
    wrong = fusion.FusionError(f"What is painted in region {number} cannot be read; paint it again.")
    if not url.startswith(DATA_URL) or len(url) > MAX_MASK_LENGTH:
        raise wrong
    try:
        with Image.open(BytesIO(base64.b64decode(url[len(DATA_URL) :], validate=True)), formats=("PNG",)) as image:
            if max(image.size) > MAX_MASK_SIDE:
                raise wrong
            return image.copy()
    except (binascii.Error, OSError, ValueError, Image.DecompressionBombError):
        raise wrong from None
