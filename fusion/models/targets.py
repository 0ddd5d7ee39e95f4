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
from fusion.layer_names import COMPONENTS, component_of

_ENCODERS_FIRST = sorted(COMPONENTS.values(), key=lambda component: not component.tokenizer)
GATED_TARGETS = tuple(target for component in _ENCODERS_FIRST for target in component.gated_targets)
UNGATED_TARGETS = tuple(target for component in _ENCODERS_FIRST for target in component.targets)


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
    fragments = [path] if path else COMPONENTS[component].attention if component in COMPONENTS else ()
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
