"""Compatibility: what to expect of fusing some adapters, before it is done."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fusion.adapters.adapter import Adapter
from fusion.adapters.combination_checks import check_bases, check_tokens, quoted, slice_clashes
from fusion.composition.fused_branches import split_branches
from fusion.composition.input_interference import CrossTalk, cross_talk
from fusion.composition.weight_interference import Interference, cosine_interference
from fusion.errors import ConfigError, FusionError
from fusion.models.base_check import check_base
from fusion.models.pipeline import Pipeline
from fusion.spectral.moments import Moments

# What is worth a sentence, of ungated adapters:
MAX_COSINE = 0.1  # of the changes of two adapters at one layer
MAX_CROSS_TALK = 0.5
MAX_IDENTITY_LOSS = 0.25


@dataclass(frozen=True)
class Forecast:
    """How much of its identity each concept will lose to each other one."""

    tokens: list[str]
    lost: list[list[float | None]]  # [by][of]: 0 nothing, 1 all that distinguishes it from its noun; None: not known


@dataclass(frozen=True)
class Compatibility:
    """What to expect of fusing some adapters."""

    verdict: str  # "compatible", "caution" or "refused"
    sentence: str
    problems: list[str]
    advice: list[str]
    names: list[str]
    slices: dict[str, list[str]]
    interference: Interference
    cross_talk: CrossTalk | None  # where moments were passed
    forecast: Forecast | None  # where it was passed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compatibility(
    adapters: Sequence[Adapter],
    pipe: Pipeline | None = None,
    moments: Sequence[Moments] | None = None,
    forecast: Forecast | None = None,
    *,
    foresight: Forecast | None = None,
) -> Compatibility:
    """Whether adapters can be fused, and what to expect: bases, tokens, slices, gates, layer by layer interference.

    With `pipe`, every adapter is also checked against that base; with their `moments` on it (`record_moments`), ungated
    ones also on the inputs of the others. Nothing is changed, no picture is drawn. Over pairs of ungated adapters,
    large responses to each other's inputs did not predict what pictures lose; `forecast` did (docs/fusion-bench.md).
    `foresight` is the former name of `forecast`. Raises ConfigError for moments without a base.
    """
    if foresight is not None:
        message = "compatibility(foresight=) is now compatibility(forecast=); the old keyword goes away in 0.3"
        warnings.warn(message, FutureWarning, stacklevel=2)
        forecast = foresight
    if moments is not None and pipe is None:
        raise ConfigError("Moments belong to one base; give its pipeline too.")
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
    measured = cosine_interference(adapters)
    talk = cross_talk(pipe, adapters, moments) if pipe is not None and moments is not None and not refusals else None
    cautions, advice = _cautions(adapters, measured)
    if talk:
        cautions += _disturbances(adapters, talk)
    if forecast:
        cautions += _losses(forecast)
    verdict = "refused" if refusals else "caution" if cautions else "compatible"
    return Compatibility(
        verdict,
        (refusals + cautions + [_all_compatible(adapters)])[0],
        refusals + cautions,
        advice,
        measured.names,
        {adapter.info.name: [str(part) for part in adapter.slices] for adapter in adapters},
        measured,
        talk,
        forecast,
    )


def _disturbances(adapters: Sequence[Adapter], talk: CrossTalk) -> list[str]:
    """A sentence for each concept that an ungated adapter disturbs: the one that does most, and at which layer most."""
    parts = [part for adapter in adapters for part in split_branches(adapter)]
    ungated = [i for i, part in enumerate(parts) if not all(branch.gate for branch in part.branches)]
    sentences: list[tuple[float, str]] = []
    for j, name in enumerate(talk.names):
        others = [i for i in ungated if i != j]
        if not others:
            continue
        most = max(others, key=lambda i: talk.ratio[i][j])
        layer = max(talk.by_layer, key=lambda layer: talk.by_layer[layer][most][j])
        if (ratio := talk.ratio[most][j]) >= MAX_CROSS_TALK:
            sentences.append((ratio, (
                f"'{talk.names[most]}' changes outputs of layers {ratio:.2f} times as much as '{name}' itself on "
                f"prompts of '{name}', most at {layer}."
            )))  # fmt: skip
    return [sentence for _, sentence in sorted(sentences, reverse=True)]


def _losses(forecast: Forecast) -> list[str]:
    """A sentence for each concept that another one will disturb, with the one that does most, the worst first."""
    sentences: list[tuple[float, str]] = []
    for token, column in zip(forecast.tokens, zip(*forecast.lost, strict=True), strict=True):
        losses = [(loss, by) for loss, by in zip(column, forecast.tokens, strict=True) if loss is not None]
        loss, by = max(losses, default=(0.0, ""))
        if loss >= MAX_IDENTITY_LOSS:
            share = f"{min(loss, 1):.0%} of what distinguishes it from its noun"
            sentences.append((loss, f"{token} will lose about {share} to {by}, by the first denoising step."))
    return [sentence for _, sentence in sorted(sentences, reverse=True)]


def _cautions(adapters: Sequence[Adapter], measured: Interference) -> tuple[list[str], list[str]]:
    cautions: list[str] = []
    advice: list[str] = []
    ungated = [a.info.name for a in adapters if not all(branch.gate for branch in a.branches)]
    if len(adapters) > 1 and ungated:
        cautions.append(
            f"{quoted(ungated)} {'acts' if len(ungated) == 1 else 'act'} on every token, so "
            f"{'it' if len(ungated) == 1 else 'they'} will change the other concepts too."
        )
        advice.append("Train with gating 'tokens' to keep concepts apart; slices of their own do not isolate them.")
    bases = [a.info.base for a in adapters if a.info.base]
    if any(not base.is_same(bases[0]) for base in bases):
        names = quoted(dict.fromkeys(base.name for base in bases))
        cautions.append(f"These were trained on bases with different weights: {names}.")
        advice.append("Slices are only known to be disjoint on one and the same base.")
    alike = [pair for pair in measured.worst(1) if abs(pair[3]) > MAX_COSINE]
    if alike and ungated:
        layer, first, second, value = alike[0]
        cautions.append(f"'{first}' and '{second}' change the same weights: cosine {value:+.2f} at {layer}.")
        advice.append("Lower a strength, or retrain one of them on another slice.")
    return cautions, advice


def _all_compatible(adapters: Sequence[Adapter]) -> str:
    if len(adapters) == 1:
        return f"'{adapters[0].info.name}' is the only adapter; there is nothing it could conflict with."
    return (
        f"{len(adapters)} adapters, each acting at its own tokens only: prompts with one of them, or with none, are "
        "drawn exactly as if it were alone."
    )
