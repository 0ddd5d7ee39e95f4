"""Compatibility: what fusing would mean, told before it is done."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fusion.adapters.adapter import Adapter
from fusion.composition.checks import check_bases, check_tokens, quoted, slice_clashes
from fusion.composition.fusing import taken_apart
from fusion.composition.input_interference import CrossTalk, cross_talk
from fusion.composition.weight_interference import Interference, interference
from fusion.errors import ConfigError, FusionError
from fusion.models.base_check import check_base
from fusion.models.pipeline import Pipeline
from fusion.spectral.moments import Moments

NOTICEABLE = 0.1  # weight cosine from which ungated adapters are said to pull at the same thing
LOUD = 0.5  # cross-talk from which an ungated adapter is said to disturb another
SPOILED = 0.25  # share of identity from which a concept is said to suffer


@dataclass(frozen=True)
class Foresight:
    """What each concept will lose of its identity to each other one (`foresee`)."""

    tokens: list[str]
    lost: list[list[float | None]]  # [by][into]: 0 nothing, 1 all that sets it apart from its noun; None: not known


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
    cross_talk: CrossTalk | None  # of activations, where moments were given
    foresight: Foresight | None  # of identity, where it was given

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compatibility(
    adapters: Sequence[Adapter],
    pipe: Pipeline | None = None,
    moments: Sequence[Moments] | None = None,
    foresight: Foresight | None = None,
) -> Compatibility:
    """Whether adapters can be fused, and what to expect: bases, tokens, slices, gates, layer by layer interference.

    With `pipe`, every adapter is also held against that base; with their `moments` on it (`record_moments`), ungated
    ones also against the inputs at which the others speak. Nothing is changed, no picture is drawn.
    Being loud is not yet doing harm: over pairs of ungated adapters it did not predict what pictures lose, which
    `foresight` did (docs/fusion-bench.md). Raises ConfigError for moments without a base.
    """
    if moments is not None and pipe is None:
        raise ConfigError("Moments say something of one base only; give its pipeline too.")
    refusals: list[str] = []
    checks = [lambda: check_bases(adapters), lambda: check_tokens(adapters)]
    if pipe is not None:
        checks += [partial(check_base, pipe, adapter) for adapter in adapters]
    for check in checks:
        try:
            check()
        except FusionError as error:
            refusals.append(str(error))
    clashes = slice_clashes(adapters)
    refusals += [f"{clash.sentence()} {clash.advice()}" for clash in clashes]
    measured = interference(adapters)
    talk = cross_talk(pipe, adapters, moments) if pipe is not None and moments is not None and not refusals else None
    cautions, advice = _cautions(adapters, measured)
    if talk:
        cautions += _disturbances(adapters, talk)
    if foresight:
        cautions += _losses(foresight)
    verdict = "refused" if refusals else "caution" if cautions else "compatible"
    return Compatibility(
        verdict,
        (refusals + cautions + [_all_well(adapters)])[0],
        refusals + cautions,
        advice,
        measured.names,
        {adapter.info.name: [str(part) for part in adapter.slices] for adapter in adapters},
        measured,
        talk,
        foresight,
    )


def _disturbances(adapters: Sequence[Adapter], talk: CrossTalk) -> list[str]:
    """A sentence for each concept that an ungated adapter disturbs: the loudest one, and where it is loudest."""
    parts = [part for adapter in adapters for part in taken_apart(adapter)]
    ungated = [i for i, part in enumerate(parts) if not all(branch.gate for branch in part.branches)]
    found: list[tuple[float, str]] = []
    for j, into in enumerate(talk.names):
        others = [i for i in ungated if i != j]
        if not others:
            continue
        loudest = max(others, key=lambda i: talk.ratio[i][j])
        layer = max(talk.by_layer, key=lambda name: talk.by_layer[name][loudest][j])
        if (ratio := talk.ratio[loudest][j]) >= LOUD:
            found.append((ratio, (
                f"'{talk.names[loudest]}' is {ratio:.2f} times as loud as '{into}' itself where '{into}' is drawn, "
                f"loudest at {layer}."
            )))  # fmt: skip
    return [sentence for _, sentence in sorted(found, reverse=True)]


def _losses(foresight: Foresight) -> list[str]:
    """A sentence for each concept that another one will spoil, with the one that does most, the worst first."""
    found: list[tuple[float, str]] = []
    for into, column in zip(foresight.tokens, zip(*foresight.lost, strict=True), strict=True):
        most = max(
            ((loss, by) for loss, by in zip(column, foresight.tokens, strict=True) if loss is not None), default=None
        )
        if most and most[0] >= SPOILED:
            share = f"{min(most[0], 1):.0%} of what sets it apart from its noun"
            found.append((most[0], f"{into} will lose about {share} to {most[1]}, by what the first step expects."))
    return [sentence for _, sentence in sorted(found, reverse=True)]


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
