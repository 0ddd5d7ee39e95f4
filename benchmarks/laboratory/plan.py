"""Which arms are scored on which sets of concepts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.laboratory import prediction
from benchmarks.laboratory.arms import CONTROLS, arms, plain_arms
from benchmarks.laboratory.concepts import NAMES, Concept, concepts
from benchmarks.laboratory.trainer import Size

UNLIKE = NAMES[:8]
LOOK_ALIKES = ("octopus", "robot", "octopus-noto", "robot-tweet")  # two nouns, each by two artists
CURVE = (  # arms whose retention is shown for every number of concepts
    *("spectral", "lora, direct_sum", "spectral-open", "spectral-same", "orthogonal"),
    *("lora, average", "lora, ties", "lora, regression", "lora-gated", "spectral-quiet", "lora-quiet"),
    *("spectral, exported", "spectral-gated-quiet, exported"),
)
MANY = ("spectral", "lora-gated", "lora, direct_sum", "lora, average", "lora, ties")  # arms with all sixteen concepts
DISTILLED = ("spectral-gated-quiet, distilled", "lora-gated, distilled")  # scored on every set of concepts
EACH_ALONE = "spectral-gated-quiet, distilled each alone"  # on four, too
RANKS = (4, 8, 16, 32, 64)
SEARCHED = ("spectral", "lora", "lora-gated", "spectral-open", "orthogonal")


@dataclass(frozen=True)
class Row:
    arm: str
    names: tuple[str, ...]
    pairs: bool = True


@dataclass(frozen=True)
class Plan:
    size: Size
    seeds: int
    rows: Sequence[Row]
    predicted: tuple[str, ...]  # concepts all of whose pairs are predicted
    recipes: tuple[str, ...] = prediction.RECIPES
    searched: tuple[str, ...] = SEARCHED  # recipes whose learning rate is searched for
    ranks: tuple[int, ...] = RANKS  # of distillations of the predicted concepts, for the curve of their errors

    @property
    def tried(self) -> list[Concept]:
        """The concepts on which learning rates are searched for."""
        return concepts(self.predicted[:2])


FULL = Plan(
    Size(),
    seeds=4,
    rows=[
        *(Row(arm, UNLIKE) for arm in arms() if arm not in (*CONTROLS, *plain_arms())),
        *(Row(arm, UNLIKE[:n], pairs=False) for n in (1, 2, 4) for arm in CURVE),
        *(Row(arm, NAMES, pairs=False) for arm in MANY),
        *(Row(arm, UNLIKE[:4], pairs=False) for arm in CONTROLS),
        *(Row(arm, NAMES[:n], pairs=n > 1) for n in (1, 2, 4, 16) for arm in DISTILLED),
        Row(EACH_ALONE, UNLIKE[:4]),
        *(Row(arm, UNLIKE[:2]) for arm in plain_arms()),
        *(Row(arm, LOOK_ALIKES) for arm in DISTILLED),
        *(Row(arm, LOOK_ALIKES) for arm in ("spectral", "spectral, places found", "lora, direct_sum", "spectral-open")),
    ],
    predicted=UNLIKE,
)
QUICK = Plan(
    Size(rank=4, steps=60, batch=4),
    seeds=2,
    rows=[Row(arm, UNLIKE[:2]) for arm in ("spectral", "spectral, places found", "lora, direct_sum", "lora, switch")],
    predicted=UNLIKE[:2],
    recipes=("lora",),
    searched=(),
    ranks=(),
)


def narrowed(names: Sequence[str], sets: Sequence[str], ranks: Sequence[int] = ()) -> Plan:
    """Some arms at the full size and the base's own rate, to check arms or another base.

    `sets` are numbers of concepts, or "look-alikes"; the first is the main one, which is also distilled at `ranks`.
    """
    concepts_of = {text: LOOK_ALIKES if text == "look-alikes" else NAMES[: int(text)] for text in sets}
    rows = [Row(arm, each, pairs=len(each) > 1) for each in concepts_of.values() for arm in names]
    return replace(FULL, rows=rows, predicted=concepts_of[sets[0]], recipes=(), searched=(), ranks=tuple(ranks))
