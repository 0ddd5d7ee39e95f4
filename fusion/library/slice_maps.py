"""Who owns what of a base's spectrum, and what is free: what a library says, held against a pipeline."""

from dataclasses import dataclass

from fusion.adapters.adapter import BaseInfo
from fusion.library.library_folder import Library, SliceOwner
from fusion.models.layer_sites import components, matrix, sites
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_info
from fusion.models.targets import default_targets, resolve


@dataclass(frozen=True)
class SliceMap:
    """The spectrum of one base: `capacity` directions, and their owners."""

    base: BaseInfo
    capacity: int  # directions of the narrowest layer that is adapted by default
    owners: list[SliceOwner]

    @property
    def free(self) -> int:
        """Directions nobody owns."""
        return self.capacity - len({i for owner in self.owners for i in owner.slice.indices if i < self.capacity})


def slice_map(pipe: Pipeline, library: Library) -> SliceMap:
    """The slices of the base in `pipe`: owned by the library's adapters, or by trainings under way there."""
    info, places = base_info(pipe), sites(pipe)
    names = resolve(default_targets(components(pipe), gated=True), places)
    return SliceMap(info, min(min(matrix(places[name]).shape) for name in names), library.slice_map(info))
