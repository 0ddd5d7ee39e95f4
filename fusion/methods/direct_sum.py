"""ΔW = Σ strengthᵢ ΔWᵢ. On disjoint slices this is the joint spectral merge, exactly."""

from collections.abc import Sequence


def weights(strengths: Sequence[float], _gram: object) -> Sequence[float]:
    return tuple(strengths)
