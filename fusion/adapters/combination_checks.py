"""What forbids fusing: adapters of different families, one token twice, slices that overlap without gates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusion.adapters import LAYER_TYPES
from fusion.adapters.adapter import Adapter, Branch
from fusion.errors import BaseMismatch, TokenConflict


def check_bases(adapters: Sequence[Adapter]) -> None:
    """Raise BaseMismatch for adapters of different families."""
    known = [adapter for adapter in adapters if adapter.info.base is not None]
    for other in known[1:]:
        first, second = known[0].info.base, other.info.base
        assert first is not None and second is not None
        if first.family != second.family:
            raise BaseMismatch(
                f"'{known[0].info.name}' was trained on {first.name} ({first.family}) and '{other.info.name}' on "
                f"{second.name} ({second.family}); adapters of different families cannot be fused."
            )


def check_tokens(adapters: Sequence[Adapter]) -> None:
    """Raise TokenConflict for a token that two adapters use."""
    owners: dict[str, str] = {}
    for adapter in adapters:
        for concept in adapter.info.concepts:
            if concept.token in owners:
                raise TokenConflict(
                    f"'{owners[concept.token]}' and '{adapter.info.name}' both use {concept.token}; rename one: "
                    f"adapter.renamed({{'{concept.token}': '<another>'}}), or --rename '{concept.token}=<another>'."
                )
            owners[concept.token] = adapter.info.name


def other_clip_skip(adapter: Adapter, clip_skip: int, use: str) -> str | None:
    """A sentence for an adapter that was trained with another clip_skip than that of its `use` ("drawn")."""
    trained = adapter.info.provenance.settings.get("clip_skip")
    if not isinstance(trained, int) or trained == clip_skip:
        return None
    return (
        f"'{adapter.info.name}' was trained with clip_skip {trained} and is {use} with {clip_skip}, so its concepts "
        "may look different."
    )


@dataclass(frozen=True)
class SliceClash:
    """Two adapters that own some of the same directions in the same layers, and act at some of the same tokens."""

    first: str
    second: str
    directions: tuple[int, ...]
    layers: int

    def sentence(self) -> str:
        ends = sorted({min(self.directions), max(self.directions)})
        directions = "-".join(str(end) for end in ends)
        return f"'{self.first}' and '{self.second}' both use directions {directions} in {self.layers} layers."

    def advice(self) -> str:
        return "Retrain one on another slice (train with --library hands out free ones), or fuse by method 'average'."


def slice_clashes(adapters: Sequence[Adapter]) -> list[SliceClash]:
    """Overlapping slices between the branches of different adapters, where an index means the same to both types.

    Branches gated by different tokens do not clash: they never act at the same token.
    """
    pairs = [
        (one, a, two, b)
        for i, one in enumerate(adapters)
        for two in adapters[i + 1 :]
        for a in one.branches
        for b in two.branches
    ]
    return [clash for pair in pairs if (clash := _clash(*pair)) is not None]


def _clash(one: Adapter, a: Branch, two: Adapter, b: Branch) -> SliceClash | None:
    kinds = {LAYER_TYPES[a.type].slice_of, LAYER_TYPES[b.type].slice_of}
    shared = sorted({i for s in a.slices for t in b.slices for i in s.overlap(t)})
    layers = len(set(a.layers) & set(b.layers))
    apart = bool(a.gate and b.gate) and not set(a.gate) & set(b.gate)
    if len(kinds) > 1 or None in kinds or not shared or not layers or apart:
        return None
    return SliceClash(_owner(one, a), _owner(two, b), tuple(shared), layers)


def _owner(adapter: Adapter, branch: Branch) -> str:
    return adapter.info.name if len(adapter.branches) == 1 else branch.name


def quoted(words: Iterable[str]) -> str:
    items = [f"'{word}'" for word in words]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
