"""Whether the pictures show the concepts that were asked for: judged on crops, against the concepts' own references.

    M_ij  likeness of the crop where concept i was asked for to the references of concept j
    L_ij  M_ij - M⁰_ij with M⁰ from pictures of the same prompts and seeds drawn by concept i's adapter alone (others
          by their nouns): what fusion lets into i's place of j, and not what the two have in common anyway; once for
          crops of pairs, once for pictures of one concept

Whole-picture scores hardly follow what people see in pictures of several things; crops do. A concept counts as there
when its crop is nearer to what its adapter draws alone than to what the base makes of its noun.

Shapes: C concepts, S seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from PIL import Image
from torch import Tensor

from fusion.evaluation.clip_judge import Judge, likeness, reliability

SINGLE = "a {first} on a blue background"
PAIR = "a {first} on the left and a {second} on the right"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
RESAMPLES = 1000

Draw = Callable[[str, int], Image.Image]  # prompt, seed -> picture


@dataclass(frozen=True)
class Scene:
    """The ways to draw that are compared: by the base, by each concept's adapter alone, and by all together."""

    base: Draw
    alone: Mapping[str, Draw]  # token -> its adapter
    together: Draw
    nouns: Mapping[str, str]  # token -> what the base calls such a thing


@dataclass(frozen=True)
class Share:
    """A mean over seeds and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Identity:
    """What the judge sees. Lists and rows are in the order of `tokens`."""

    tokens: list[str]
    judge: str
    reliability: float  # of the judge: references told apart, 0 … 1
    floor: list[float]  # likeness of the base's noun to the references
    alone: list[float]  # likeness of the concept drawn by its adapter alone
    retention: list[Share]  # all together, single prompts: 1 as alone, 0 as the base's noun
    pair_retention: list[Share]  # the same for its crop of pictures of two; 1 as in the same pair drawn alone
    matrix: list[list[float]]  # M over crops of pairs
    leakage: list[list[float]]  # L, its diagonal what a concept loses itself
    single_leakage: list[list[float]]  # the same over pictures of one concept
    omission: float  # share of asked crops in which the concept is not there
    redundancy: float  # share of crops that show another concept, and that one better


def measure_identity(
    scene: Scene,
    judge: Judge,
    references: Mapping[str, Sequence[Image.Image]],
    seeds: Sequence[int],
    *,
    single: str = SINGLE,
    pair: str = PAIR,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Identity:
    """Draw every concept alone and every pair, with every seed, and judge what is seen.

    `single` and `pair` are the prompts, with {first} and {second}; a pair's first is to stand in the left half.
    `pairs`: those of tokens to draw, in which each token should be; all ordered ones if not given.
    """
    tokens, own = list(references), [judge.pictures(pictures) for pictures in references.values()]

    def seen(draw: Draw, first: str, second: str | None = None) -> tuple[Tensor, Tensor]:
        """Likeness (S, C) of the picture of `first`, or of the crops of both."""
        template = pair if second else single
        pictures = [draw(template.format(first=first, second=second), seed) for seed in seeds]
        crops = [[crop(p, box) for p in pictures] for box in (LEFT, RIGHT)] if second else [pictures, pictures]
        left, right = (likeness(judge.pictures(part), own) for part in crops)
        return left, right

    noun = scene.nouns
    singles = {
        token: [seen(draw, word)[0] for draw, word in (
            (scene.base, noun[token]), (scene.alone[token], token), (scene.together, token)
        )]
        for token in tokens
    }  # fmt: skip
    floor, alone = ({t: float(singles[t][k][:, i].mean()) for i, t in enumerate(tokens)} for k in (0, 1))
    spill = torch.stack([(singles[t][2] - singles[t][1]).mean(dim=0) for t in tokens])
    fused: dict[str, list[Tensor]] = {token: [] for token in tokens}  # crops of each, (S, C) a pair
    lone: dict[str, list[Tensor]] = {token: [] for token in tokens}
    for first, second in permutations(tokens, 2) if pairs is None else pairs:
        both = seen(scene.together, first, second)
        fused[first].append(both[0])
        fused[second].append(both[1])
        lone[first].append(seen(scene.alone[first], first, noun[second])[0])
        lone[second].append(seen(scene.alone[second], noun[first], second)[1])
    matrix, before = (_means(crops, len(tokens)) for crops in (fused, lone))
    there = {t: (floor[t] + alone[t]) / 2 for t in tokens}
    shown = [(i, row) for i, t in enumerate(tokens) for part in fused[t] for row in part]
    lines = torch.tensor([there[t] for t in tokens])
    missing = [bool(row[i] < lines[i]) for i, row in shown]
    doubled = [bool(((row > lines) & (row > row[i])).any()) for i, row in shown]
    return Identity(
        tokens,
        judge.name,
        reliability(own),
        [floor[t] for t in tokens],
        [alone[t] for t in tokens],
        [share((singles[t][2][:, i] - floor[t]) / _gap(alone[t], floor[t])) for i, t in enumerate(tokens)],
        [
            share((torch.cat([p[:, i] for p in fused[t]]) - floor[t]) / _gap(float(before[i, i]), floor[t]))
            for i, t in enumerate(tokens)
            if fused[t]
        ],
        matrix.tolist(),
        (matrix - before).tolist(),
        spill.tolist(),
        sum(missing) / max(1, len(missing)),
        sum(doubled) / max(1, len(doubled)),
    )


def crop(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A part of a picture, by shares of its sides."""
    width, height = picture.size
    return picture.crop((round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)))


def share(values: Tensor) -> Share:
    """Mean of (n,) values with its percentile bootstrap interval, always the same one."""
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[picks].mean(dim=1).sort().values
    return Share(float(values.mean()), float(means[int(0.025 * RESAMPLES)]), float(means[int(0.975 * RESAMPLES) - 1]))


def _means(crops: Mapping[str, Sequence[Tensor]], count: int) -> Tensor:
    """(C, C): mean likeness of each concept's crops to all references; NaN without pairs."""
    return torch.stack([torch.cat([*parts, torch.zeros(0, count)]).mean(dim=0) for parts in crops.values()])


def _gap(alone: float, floor: float) -> float:
    """What an adapter adds to its noun, as a divisor; NaN where that is nothing, and nothing can be kept."""
    return alone - floor if abs(alone - floor) > 1e-6 else float("nan")
