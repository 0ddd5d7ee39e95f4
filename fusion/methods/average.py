"""ΔW = (1/N) Σ strengthᵢ ΔWᵢ: FedAvg, and what the paper's own code does. Each concept arrives at 1/N."""

from collections.abc import Sequence

from fusion.methods.method import LinearMethod


def _divided(strengths: Sequence[float]) -> Sequence[float]:
    return tuple(strength / len(strengths) for strength in strengths)


average_method = LinearMethod(_divided)
