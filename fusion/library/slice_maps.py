"""Which directions of a base's spectrum are owned by whom in a library, and which are free."""

from dataclasses import dataclass

from fusion.adapters.adapter import BaseInfo
from fusion.library.library_folder import Library
from fusion.library.reservations import OwnedSlice
from fusion.models.layer_sites import components, matrix, sites
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_info
from fusion.models.targets import default_targets, resolve


@dataclass(frozen=True)
class SliceMap:
    """The spectrum of one base: `capacity` directions, and their owners."""

    base: BaseInfo
    capacity: int  # directions of the narrowest layer that is adapted by default
    owners: list[OwnedSlice]

    @property
    def free(self) -> int:
        """Directions nobody owns."""
        return self.capacity - len({i for owner in self.owners for i in owner.slice.indices if i < self.capacity})


def slice_map(pipe: Pipeline, library: Library) -> SliceMap:
    """The slices of the base in `pipe`, owned by the library's adapters or by unfinished and running trainings."""
    info, layers = base_info(pipe), sites(pipe)
    names = resolve(default_targets(components(pipe), gated=True), layers)
    return SliceMap(info, min(min(matrix(layers[name]).shape) for name in names), library.slice_map(info))
