"""Ways to use N adapters together, one row of the tables each. A new fusion method gets its row by itself.

recipe   how the adapters were trained
prepare  (pipe, adapters) -> Prepared: the fused adapter, and a function that draws
"""

from __future__ import annotations  # the names of the arms must not load torch

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

from PIL import Image

import fusion
from benchmarks.laboratory.distilling import DEFAULTS, Distillation
from benchmarks.laboratory.recipes import PLAIN

Draw = Callable[[str, int, int], list[Image.Image]]  # prompt, seed, batch -> pictures
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
SLOW = {"gradient"}  # 500 iterations of LBFGS a layer; benchmarks/regression.py compares it with regression
GATED = {"distill"}  # needs gated adapters; rows of its own


@dataclass(frozen=True)
class Prepared:
    draw: Draw
    adapter: fusion.Adapter | None  # the fused one; None without fusion


@dataclass(frozen=True)
class Arm:
    recipe: str
    about: str
    prepare: Callable[[Any, Sequence[fusion.Adapter]], Prepared]
    single: str = ""  # the arm with the same pictures of prompts with one concept or none, which draws them
    distillation: Distillation | None = None  # what `prepare` gets are the distilled adapters
    styled: bool = False  # under the LoRA of a style, which `prepare` gets behind the concepts'


def fused(
    method: str,
    regions: Callable[[str, fusion.Adapter], Any] = lambda prompt, adapter: (),
    parts: Callable[[Sequence[fusion.Adapter]], Sequence[fusion.Adapter]] = lambda adapters: adapters,
    gating: str | None = None,
) -> Callable[..., Any]:
    """Fuse by a method and draw with the result; `parts` gives the adapters to fuse, `gating` as in fuse."""

    def prepare(pipe: Any, adapters: Sequence[fusion.Adapter]) -> Prepared:
        base = pipe if fusion.METHODS[method].needs_base else None
        adapter = fusion.fuse(parts(adapters), method=method, pipe=base, allow_overlap=True, name=method, gating=gating)

        def draw(prompt: str, seed: int, batch: int) -> list[Image.Image]:
            config = fusion.GenerationConfig(
                prompt=prompt, seed=seed, num_images=batch, regions=regions(prompt, adapter)
            )
            return [picture.image for picture in fusion.generate(pipe, config, [adapter])]

        return Prepared(draw, adapter)

    return prepare


def unfused(name: str) -> Callable[..., Any]:
    """Draw by a function of multi_lora.py, without fusion."""

    def prepare(pipe: Any, adapters: Sequence[fusion.Adapter]) -> Prepared:
        draw = getattr(import_module("benchmarks.laboratory.multi_lora"), name)
        return Prepared(partial(draw, pipe, adapters), None)

    return prepare


def halves(prompt: str, adapter: fusion.Adapter) -> list[fusion.Region]:
    """The first concept of the prompt on the left, the second on the right."""
    tokens = sorted((c.token for c in adapter.info.concepts if c.token in prompt), key=prompt.index)
    return [fusion.Region(token, box) for token, box in zip(tokens, HALVES, strict=True)] if len(tokens) == 2 else []


def twice(adapters: Sequence[fusion.Adapter]) -> list[fusion.Adapter]:
    """Each adapter twice at half strength, once under another name: their sum is the adapter."""
    halves = [replace(a, branches=tuple(replace(b, strength=b.strength / 2) for b in a.branches)) for a in adapters]
    copies = [a.renamed({c.token: f"{c.token[:-1]}-again>" for c in a.info.concepts}) for a in halves]
    return [*halves, *(replace(a, info=replace(a.info, name=f"{a.info.name}-again")) for a in copies)]


def bound(
    regions: Callable[[str, fusion.Adapter], Any] = lambda prompt, adapter: (), *, styled: bool = False
) -> Callable[..., Any]:
    """Bind each concept's LoRA to its word; the LoRA of a style acts on every prompt."""

    def prepare(pipe: Any, adapters: Sequence[fusion.Adapter]) -> Prepared:
        split = len(adapters) - styled
        loras = [fusion.bind(pipe, adapter, adapter.info.concepts[0].token) for adapter in adapters[:split]]
        together = fusion.fuse(loras, name="bound")

        def draw(prompt: str, seed: int, batch: int) -> list[Image.Image]:
            config = fusion.GenerationConfig(
                prompt=prompt, seed=seed, num_images=batch, regions=regions(prompt, together)
            )
            return [picture.image for picture in fusion.generate(pipe, config, [together, *adapters[split:]])]

        return Prepared(draw, None if styled else together)

    return prepare


CONTROLS = ("spectral-shuffled", "lora, twice")  # four concepts are enough for them


def distilled(recipe: str, about: str, *, each: bool = False, settings: Mapping[str, Any] = DEFAULTS) -> Arm:
    return Arm(recipe, about, fused("direct_sum"), distillation=Distillation(each, settings))


def arms() -> dict[str, Arm]:
    """By name, in the order of the tables."""
    rows = {
        "spectral": Arm("spectral", "own slices, gated by tokens, summed", fused("direct_sum")),
        "spectral, places found": Arm(
            "spectral", "the same with regions='auto'", fused("direct_sum", lambda *_: "auto"), "spectral"
        ),
        "spectral, places given": Arm(
            "spectral", "the same with a region each, drawn by hand", fused("direct_sum", halves), "spectral"
        ),
        "spectral-gated-quiet": Arm(
            "spectral-gated-quiet", "taught with the quiet loss, too: pocket's default", fused("direct_sum")
        ),
        "spectral-gated-quiet, places found": Arm(
            "spectral-gated-quiet",
            "the same with regions='auto': the studio's default",
            fused("direct_sum", lambda *_: "auto"),
            "spectral-gated-quiet",
        ),
        "lora-gated": Arm("lora-gated", "LoRA gated by tokens, summed", fused("direct_sum")),
        "spectral-open": Arm("spectral-open", "own slices, ungated, summed", fused("direct_sum")),
        "spectral-same": Arm("spectral-same", "one slice for all, ungated, summed", fused("direct_sum")),
        "orthogonal": Arm("orthogonal", "Orthogonal Adaptation, summed", fused("direct_sum")),
        "spectral-quiet": Arm("spectral-quiet", "own slices, ungated, quiet loss, summed", fused("direct_sum")),
        "lora-quiet": Arm("lora-quiet", "LoRA, ungated, quiet loss, summed", fused("direct_sum")),
        "spectral, exported": Arm(
            "spectral", "gated ones as plain LoRAs, without gates, summed", fused("direct_sum", gating="none")
        ),
        "spectral-gated-quiet, exported": Arm(
            "spectral-gated-quiet", "the same as plain LoRAs, without gates", fused("direct_sum", gating="none")
        ),
        "spectral-gated-quiet, distilled": distilled("spectral-gated-quiet", "the same distilled into one plain LoRA"),
        "spectral-gated-quiet, distilled each alone": distilled(
            "spectral-gated-quiet", "each distilled into a plain LoRA of its own, summed", each=True
        ),
        "spectral-gated-quiet, distilled from words": distilled(
            "spectral-gated-quiet",
            "distilled into one plain LoRA from prompts of the tokenizer's words alone",
            settings={"use_templates": False},
        ),
        "lora-gated, distilled": distilled("lora-gated", "gated LoRA distilled into one plain LoRA"),
        "spectral-shuffled": Arm("spectral-shuffled", "own slices in another order, ungated", fused("direct_sum")),
        "lora, twice": Arm(
            "lora", "each LoRA twice at half strength: must be as their sum", fused("direct_sum", parts=twice)
        ),
    }
    for name, method in fusion.METHODS.items():
        if name not in SLOW | GATED:
            rows[f"lora, {name}"] = Arm("lora", f"LoRA, {method.about}", fused(name))
    rows["spectral-open, regression"] = Arm("spectral-open", "own slices, ungated, regression", fused("regression"))
    rows["lora, switch"] = Arm("lora", "LoRA, one at a time in turns", unfused("switch"))
    rows["lora, composite"] = Arm("lora", "LoRA, the mean of their predictions", unfused("composite"))
    return rows | plain_arms()


def plain_arms() -> dict[str, Arm]:
    """Plain LoRAs by PEFT, on all attention layers and on ordinary words: as they are, and bound to their words."""
    rows = {
        f"{PLAIN}, bound": Arm(PLAIN, "plain LoRA, each bound to its word, regions found", bound()),
        f"{PLAIN}, bound, places given": Arm(PLAIN, "the same with a region each, drawn by hand", bound(halves)),
        f"{PLAIN}, bound, styled": Arm(PLAIN, "bound, under a style", bound(styled=True), styled=True),
    }
    for name, method in fusion.METHODS.items():
        if name not in SLOW | GATED:
            rows[f"{PLAIN}, {name}"] = Arm(PLAIN, f"plain LoRA, {method.about}", fused(name))
    rows[f"{PLAIN}, composite"] = Arm(PLAIN, "plain LoRA, the mean of their predictions", unfused("composite"))
    return rows
