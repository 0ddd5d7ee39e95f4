"""LoCon: LoRA of convolutions with a kernel of rank Q in the middle, and of DoRA. LyCORIS (arXiv 2309.14859)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.adapters.imported import ImportedLayer, check_rank, factored
from fusion.spectral.delta import Delta


class LoconLayer(ImportedLayer):
    """ΔV = alpha/Q · up · down, or alpha/Q · up · mid · down, a CP decomposition of the kernel.

    up (O, Q), down (Q, I·K); with mid (Q, Q, k, k) down is (Q, I).
    """

    factors = ("up", "down", "mid")
    up: Tensor
    down: Tensor
    mid: Tensor | None

    @classmethod
    def factor_sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        check_rank(shapes, "up", "down")
        rank, mid = shapes["up"][1], shapes.get("mid", ())
        if "mid" in shapes and (len(mid) != 4 or mid[:2] != (rank, rank)):
            raise ValueError(f"mid has shape {mid}, but the rank is {rank}")
        return shapes["up"][0], shapes["down"][1] * (mid[2] * mid[3] if mid else 1)

    def change(self) -> Delta:
        down = self.down
        if self.mid is not None:
            down = torch.einsum("pqkl,qi->pikl", self.mid, down).flatten(1)  # (Q, I·K)
        return factored(self.up * (self.alpha / self.up.shape[1]), down)
