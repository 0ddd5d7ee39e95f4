"""Whether pictures show the concepts of their prompts: crops are compared with the concepts' references.

    M_ij  similarity of the crop that should show concept i to the references of concept j
    L_ij  M_ij - M⁰_ij with M⁰ from pictures of the same prompts and seeds drawn by concept i's adapter alone (others
          by their nouns): how much of j fusion adds to i's crop, without what the two have in common anyway; once for
          crops of pairs, once for pictures of one concept

Scores of whole pictures hardly agree with people's judgement of pictures of several things; scores of crops do. A
concept counts as present when its crop is nearer to what its adapter draws alone than to what the base draws.

Shapes: C concepts, S seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from PIL import Image
from torch import Tensor

from fusion.evaluation.clip_judge import Judge, reliability, similarity

SINGLE = "a {first} on a blue background"
PAIR = "a {first} on the left and a {second} on the right"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
RESAMPLES = 1000
MIN_EFFECT = 0.02  # similarity that an adapter must add to its noun for a share of it to mean anything

Draw = Callable[[str, int], Image.Image]  # prompt, seed -> picture


@dataclass(frozen=True)
class Scene:
    """The three ways to draw that are compared: the base, each concept's adapter alone, and all together."""

    base: Draw
    alone: Mapping[str, Draw]  # token -> its adapter
    together: Draw
    nouns: Mapping[str, str]  # token -> the base's word for such a thing


@dataclass(frozen=True)
class Share:
    """A mean over seeds and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if math.isnan(self.mean) else f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Identity:
    """The judge's results. Lists and rows are in the order of `tokens`."""

    tokens: list[str]
    judge: str
    reliability: float  # share of references that the judge assigns to their concept, 0 … 1
    floor: list[float]  # similarity of the base's noun to the references
    alone: list[float]  # similarity of the concept drawn by its adapter alone
    retention: list[Share]  # all together, single prompts: 1 as alone, 0 as the base's noun
    pair_retention: list[Share]  # the same for its crop of pictures of two; 1 as in the same pair drawn alone
    matrix: list[list[float]]  # M over crops of pairs
    leakage: list[list[float]]  # L; on its diagonal a concept's own loss
    single_leakage: list[list[float]]  # the same over pictures of one concept
    omission: float  # share of crops in which their concept is missing
    redundancy: float  # share of crops that show another concept more clearly


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
    """Draw every concept alone and every pair, with every seed, and compare the crops with the references.

    `single` and `pair` are the prompts, with {first} and {second}; a pair's first is to stand in the left half.
    `pairs` of tokens to draw, with each token in one at least; all ordered pairs if not given.
    """
    tokens, vectors = list(references), [judge.pictures(pictures) for pictures in references.values()]

    def measure(draw: Draw, first: str, second: str | None = None) -> tuple[Tensor, Tensor]:
        """Similarity (S, C) of the picture of `first`, or of the crops of both."""
        template = pair if second else single
        pictures = [draw(template.format(first=first, second=second), seed) for seed in seeds]
        crops = [[crop(p, box) for p in pictures] for box in (LEFT, RIGHT)] if second else [pictures, pictures]
        left, right = (similarity(judge.pictures(part), vectors) for part in crops)
        return left, right

    noun = scene.nouns
    singles = {
        token: [measure(draw, word)[0] for draw, word in (
            (scene.base, noun[token]), (scene.alone[token], token), (scene.together, token)
        )]
        for token in tokens
    }  # fmt: skip
    floor, alone = ({t: float(singles[t][k][:, i].mean()) for i, t in enumerate(tokens)} for k in (0, 1))
    spread = torch.stack([(singles[t][2] - singles[t][1]).mean(dim=0) for t in tokens])
    fused_crops: dict[str, list[Tensor]] = {token: [] for token in tokens}  # of each token, (S, C) a pair
    single_crops: dict[str, list[Tensor]] = {token: [] for token in tokens}
    for first, second in permutations(tokens, 2) if pairs is None else pairs:
        both = measure(scene.together, first, second)
        fused_crops[first].append(both[0])
        fused_crops[second].append(both[1])
        single_crops[first].append(measure(scene.alone[first], first, noun[second])[0])
        single_crops[second].append(measure(scene.alone[second], noun[first], second)[1])
    matrix, before = (_means(crops, len(tokens)) for crops in (fused_crops, single_crops))
    thresholds = torch.tensor([(floor[t] + alone[t]) / 2 for t in tokens])  # above it a concept counts as present
    rows = [(i, row) for i, t in enumerate(tokens) for part in fused_crops[t] for row in part]
    missing = [bool(row[i] < thresholds[i]) for i, row in rows]
    redundant = [bool(((row > thresholds) & (row > row[i])).any()) for i, row in rows]
    return Identity(
        tokens,
        judge.name,
        reliability(vectors),
        [floor[t] for t in tokens],
        [alone[t] for t in tokens],
        [share((singles[t][2][:, i] - floor[t]) / _gap(alone[t], floor[t])) for i, t in enumerate(tokens)],
        [
            share((torch.cat([p[:, i] for p in fused_crops[t]]) - floor[t]) / _gap(float(before[i, i]), floor[t]))
            for i, t in enumerate(tokens)
            if fused_crops[t]
        ],
        matrix.tolist(),
        (matrix - before).tolist(),
        spread.tolist(),
        sum(missing) / max(1, len(missing)),
        sum(redundant) / max(1, len(redundant)),
    )


def picture_count(concepts: int, seeds: int) -> int:
    """How many pictures `measure_identity` draws: of every concept and every ordered pair, three ways each."""
    return 3 * seeds * concepts**2


def crop(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The part of a picture in a box of shares of its width and height: left, top, right, bottom."""
    width, height = picture.size
    return picture.crop((round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)))


def share(values: Tensor) -> Share:
    """Mean of (n,) values with its percentile bootstrap interval, from a fixed seed."""
    samples = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[samples].mean(dim=1).sort().values
    return Share(float(values.mean()), float(means[int(0.025 * RESAMPLES)]), float(means[int(0.975 * RESAMPLES) - 1]))


def _means(crops: Mapping[str, Sequence[Tensor]], count: int) -> Tensor:
    """(C, C): mean similarity of each concept's crops to all references; NaN without pairs."""
    return torch.stack([torch.cat([*parts, torch.zeros(0, count)]).mean(dim=0) for parts in crops.values()])


def _gap(alone: float, floor: float) -> float:
    """What an adapter adds to its noun, as a divisor; NaN where that is too little for a share of it."""
    return alone - floor if alone - floor > MIN_EFFECT else float("nan")
