"""LoHa (Hyeon-Woo et al. 2022, arXiv 2108.06098; LyCORIS): the elementwise product of two products of low rank.

Tensors have LyCORIS's and PEFT's names.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.adapters.imported import ImportedLayer, check_rank, factored
from fusion.spectral.delta import Delta


class LohaLayer(ImportedLayer):
    """ΔV = alpha/Q · (w1_a w1_b) ∘ (w2_a w2_b), of rank Q² at most.

    w1_a, w2_a (O, Q); w1_b, w2_b (Q, I·K). With kernels t1, t2 (Q, Q, k, k) each product is that of a CP decomposition
    with w1_a, w2_a (Q, O) and w1_b, w2_b (Q, I).
    """

    factors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor | None
    hada_t2: Tensor | None

    @classmethod
    def factor_sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        kernels = [shapes[name] for name in ("hada_t1", "hada_t2") if name in shapes]
        sizes: list[tuple[int, int]] = []
        for a, b in (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")):
            turned = {**shapes, a: shapes[a][::-1]} if kernels else shapes
            check_rank(turned, a, b)
            sizes.append((turned[a][0], turned[b][1]))
        rank = shapes["hada_w1_b"][0]
        if sizes[0] != sizes[1] or shapes["hada_w2_b"][0] != rank:
            raise ValueError(f"the two products have shapes {sizes[0]} and {sizes[1]}")
        if kernels and (len(kernels) != 2 or kernels[0] != kernels[1] or kernels[0][:2] != (rank, rank)):
            raise ValueError(f"the kernels have shapes {kernels}, but the rank is {rank}")
        cells = kernels[0][2] * kernels[0][3] if kernels and len(kernels[0]) == 4 else 1
        return sizes[0][0], sizes[0][1] * cells

    def change(self) -> Delta:
        scale = self.alpha / self.hada_w1_b.shape[0]
        if self.hada_t1 is not None and self.hada_t2 is not None:
            one = _rebuilt(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            return Delta.from_dense(scale * one * _rebuilt(self.hada_t2, self.hada_w2_a, self.hada_w2_b))
        if self.hada_w1_a.shape[1] * self.hada_w2_a.shape[1] > min(self.shape):
            return Delta.from_dense(scale * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b))
        # Every product of a column of w1_a and one of w2_a is a column of `up`; rows of `down` accordingly.
        up = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None, :]).flatten(1)  # (O, Q²)
        down = (self.hada_w1_b[:, None, :] * self.hada_w2_b[None, :, :]).flatten(0, 1)  # (Q², I·K)
        return factored(up * scale, down)


def _rebuilt(kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(O, I·K) of a kernel (Q, Q, k, k) and its factors (Q, O) and (Q, I)."""
    return torch.einsum("pqkl,po,qi->oikl", kernel, a, b).flatten(1)
