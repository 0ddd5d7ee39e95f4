"""Compatibility: what fusing would mean, told before it is done."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusion.adapters.adapter import Adapter
from fusion.composition.conflicts import check_bases, check_tokens, quoted, slice_clashes
from fusion.composition.measures import Interference, interference
from fusion.errors import FusionError
from fusion.models.injection import check_base

NOTICEABLE = 0.1  # weight cosine from which ungated adapters are said to pull at the same thing


@dataclass(frozen=True)
class Compatibility:
    """What fusing would mean, told before it is done."""

    verdict: str  # "compatible", "caution" or "refused"
    sentence: str
    problems: list[str]
    advice: list[str]
    names: list[str]
    slices: dict[str, list[str]]
    interference: Interference

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compatibility(adapters: Sequence[Adapter], pipe: Any = None) -> Compatibility:
    """Whether adapters can be fused, and what to expect: bases, tokens, slices, gates, layer by layer interference.

    With `pipe`, every adapter is also held against that base. Nothing is changed, nothing is drawn.
    """
    refusals: list[str] = []
    checks = [lambda: check_bases(adapters), lambda: check_tokens(adapters)]
    if pipe is not None:
        checks += [lambda a=adapter: check_base(pipe, a) for adapter in adapters]
    for check in checks:
        try:
            check()
        except FusionError as error:
            refusals.append(str(error))
    clashes = slice_clashes(adapters)
    refusals += [f"{clash.sentence()} {clash.advice()}" for clash in clashes]
    measured = interference(adapters)
    cautions, advice = _cautions(adapters, measured)
    verdict = "refused" if refusals else "caution" if cautions else "compatible"
    return Compatibility(
        verdict,
        (refusals + cautions + [_all_well(adapters)])[0],
        refusals + cautions,
        advice,
        measured.names,
        {adapter.info.name: [str(part) for part in adapter.slices] for adapter in adapters},
        measured,
    )


def _cautions(adapters: Sequence[Adapter], measured: Interference) -> tuple[list[str], list[str]]:
    cautions: list[str] = []
    advice: list[str] = []
    open_ones = [a.info.name for a in adapters if not all(branch.gate for branch in a.branches)]
    if len(adapters) > 1 and open_ones:
        cautions.append(
            f"{quoted(open_ones)} {'acts' if len(open_ones) == 1 else 'act'} on every token, so "
            f"{'it' if len(open_ones) == 1 else 'they'} will change the other concepts too."
        )
        advice.append("Train with gating 'tokens' to keep concepts apart; own slices alone do not isolate them.")
    names = [a.info.base.name for a in adapters if a.info.base]
    if len(set(names)) > 1:
        cautions.append(f"These were trained on different bases: {quoted(dict.fromkeys(names))}.")
        advice.append("Slices are only known to be disjoint on one and the same base.")
    alike = [pair for pair in measured.worst(1) if abs(pair[3]) > NOTICEABLE]
    if alike and open_ones:
        layer, first, second, value = alike[0]
        cautions.append(f"'{first}' and '{second}' pull at the same thing: cosine {value:+.2f} at {layer}.")
        advice.append("Lower a strength, or retrain one of them on another slice.")
    return cautions, advice


def _all_well(adapters: Sequence[Adapter]) -> str:
    if len(adapters) == 1:
        return f"'{adapters[0].info.name}' stands alone; nothing can collide."
    return (
        f"{len(adapters)} adapters, each acting at its own tokens only: prompts with one of them, or with none, are "
        "drawn exactly as if it were alone."
    )
