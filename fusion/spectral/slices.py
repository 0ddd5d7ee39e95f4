"""Which singular directions a concept owns.

A slice names the same direction indices in every targeted layer; index 0 is the largest singular value.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusion.errors import SliceConflict


@dataclass(frozen=True, order=True)
class SpectralSlice:
    """`rank` directions: start, start + step, start + 2·step, …"""

    start: int
    rank: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.start < 0 or self.rank < 1 or self.step < 1:
            raise SliceConflict(
                f"A slice needs start >= 0, rank >= 1 and step >= 1, got start {self.start}, rank {self.rank}, "
                f"step {self.step}."
            )

    @classmethod
    def contiguous(cls, k: int, rank: int) -> "SpectralSlice":
        """The k-th block of `rank` neighbours, kR … kR+R−1: the paper's layout."""
        return cls(k * rank, rank)

    @classmethod
    def strided(cls, k: int, rank: int, slots: int) -> "SpectralSlice":
        """k, k+slots, k+2·slots, …: every slot gets large and small singular values alike."""
        if k >= slots:
            raise SliceConflict(f"Slice {k} does not exist among {slots} strided slots; the last is {slots - 1}.")
        return cls(k, rank, slots)

    @property
    def indices(self) -> range:
        return range(self.start, self.stop, self.step)

    @property
    def stop(self) -> int:
        """One past the last direction."""
        return self.start + (self.rank - 1) * self.step + 1

    def overlap(self, other: "SpectralSlice") -> tuple[int, ...]:
        """The directions both own, ascending."""
        return tuple(i for i in self.indices if i in other.indices)

    def check_fits(self, available: int, where: str = "this weight") -> None:
        """Raise SliceConflict if a layer with `available` directions is too narrow."""
        if self.stop > available:
            raise SliceConflict(
                f"Slice {self} needs {self.stop} singular directions, but {where} has {available}. "
                "Use a lower slice number or a smaller rank."
            )

    def __str__(self) -> str:
        if self.step == 1 or self.rank == 1:
            return f"{self.start}-{self.stop - 1}" if self.rank > 1 else str(self.start)
        return f"{self.start}-{self.stop - 1} step {self.step}"

    def to_json(self) -> list[int]:
        return [self.start, self.rank, self.step]

    @classmethod
    def from_json(cls, value: Sequence[int]) -> "SpectralSlice":
        start, rank, step = (int(v) for v in value)
        return cls(start, rank, step)


def free_slice(
    owned: Iterable[SpectralSlice], rank: int, *, capacity: int, layout: str = "contiguous", slots: int = 8
) -> SpectralSlice:
    """The first slice of `rank` that overlaps none of `owned`, within `capacity` directions of the narrowest layer.

    Raises SliceConflict when the spectrum is full.
    """
    owned = tuple(owned)
    for candidate in _candidates(rank, capacity, layout, slots):
        if not any(candidate.overlap(other) for other in owned):
            return candidate
    raise SliceConflict(
        f"No free {layout} slice of rank {rank} is left: {len(owned)} are taken and the narrowest layer has "
        f"{capacity} directions. Use a smaller rank, or start another library."
    )


def least_shared_slice(
    shared: Sequence[SpectralSlice],
    exclusive: Sequence[SpectralSlice],
    rank: int,
    *,
    capacity: int,
    layout: str = "contiguous",
    slots: int = 8,
) -> SpectralSlice | None:
    """The first slice of those that overlap `shared` least, counted in directions, and none of `exclusive`."""
    allowed = [
        candidate
        for candidate in _candidates(rank, capacity, layout, slots)
        if not any(candidate.overlap(other) for other in exclusive)
    ]
    return min(allowed, key=lambda part: sum(len(part.overlap(other)) for other in shared), default=None)


def _candidates(rank: int, capacity: int, layout: str, slots: int) -> list[SpectralSlice]:
    """Every slice of this rank and layout within `capacity` directions."""
    if layout == "strided":
        slices = [SpectralSlice.strided(k, rank, slots) for k in range(slots)]
    else:
        slices = [SpectralSlice.contiguous(k, rank) for k in range(capacity // rank)]
    return [part for part in slices if part.stop <= capacity]
