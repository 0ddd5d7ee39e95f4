"""ΔW = (1/N) Σ strengthᵢ ΔWᵢ: FedAvg, and what the paper's own code does. Each concept is scaled by 1/N."""

from collections.abc import Sequence


def weights(strengths: Sequence[float], _gram: object) -> Sequence[float]:
    return tuple(strength / len(strengths) for strength in strengths)
