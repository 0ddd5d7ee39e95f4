"""Targets: which layers an adapter changes, by patterns a person can write.

    unet.attn2             every projection of cross-attention           unet.attn2.to_k    its keys alone
    unet.attn1             self-attention                                unet.mid_block.*.attn2
    unet.ff  unet.proj_in  when asked   unet.*  all of it                text_encoder       its attention projections
    text_encoder.mlp       when asked                                    text_encoder_2     the same, SDXL's second

A pattern is a component and a run of path levels that must stand together; `*` bridges any levels between.
"""

import re
from collections.abc import Iterable, Sequence

from fusion.errors import UnknownName, closest
from fusion.layer_names import component_of

# What a bare component means: its attention projections.
_ATTENTION = {"unet": ("attn1", "attn2"), "text_encoder": ("self_attn",), "text_encoder_2": ("self_attn",)}
# Where every row is a token, so that gates are exact (law 19); those of the pipeline's components are used.
GATED_TARGETS = ("text_encoder", "text_encoder_2", "unet.attn2.to_k", "unet.attn2.to_v")
# The paper's targets, for adapters without gates.
UNGATED_TARGETS = ("text_encoder", "text_encoder_2", "unet.attn1", "unet.attn2")


def default_targets(components: Iterable[str], *, gated: bool) -> tuple[str, ...]:
    """The default patterns for a pipeline that has these components."""
    present = set(components)
    return tuple(t for t in (GATED_TARGETS if gated else UNGATED_TARGETS) if component_of(t) in present)


def resolve(patterns: Sequence[str], layers: Iterable[str]) -> tuple[str, ...]:
    """The layers any pattern names, in the order of `layers`. Raises UnknownName for a pattern that names none."""
    names = tuple(layers)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if _matches(pattern, name)}
        if not matched:
            known = sorted({*_short_forms(names)})
            raise UnknownName(
                f"Target '{pattern}' names no layer of this base{closest(pattern, known)} "
                f"It has, among others: {', '.join(known[:12])}."
            )
        chosen |= matched
    return tuple(name for name in names if name in chosen)


def _matches(pattern: str, layer: str) -> bool:
    component, _, path = pattern.partition(".")
    if component_of(layer) != component:
        return False
    fragments = [path] if path else list(_ATTENTION.get(component, ()))
    return any(_fragment(fragment).search(f".{layer}.") for fragment in fragments)


def _fragment(fragment: str) -> re.Pattern[str]:
    """Path levels that stand together, `*` for any run of levels."""
    runs = [re.escape(run.strip(".")) for run in fragment.split("*") if run.strip(".")]
    return re.compile(r"\." + r"\.(?:.*\.)?".join(runs) + r"\." if runs else "")


def _short_forms(layers: Iterable[str]) -> Iterable[str]:
    for name in layers:
        component, *path = name.split(".")
        yield component
        block = next((level for level in reversed(path[:-1]) if not level.isdigit() and level != "net"), "")
        if block and not block.startswith(("down_", "up_", "to_")):
            yield f"{component}.{block}"
