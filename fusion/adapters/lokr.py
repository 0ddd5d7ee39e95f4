"""LoKr (Edalati et al. 2022, arXiv 2212.10650; LyCORIS): a Kronecker product, whose factors may be of low rank.

Tensors have LyCORIS's and PEFT's names.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.adapters.imported import ImportedLayer, check_rank
from fusion.spectral.delta import Delta

Shapes = Mapping[str, tuple[int, ...]]


class LokrLayer(ImportedLayer):
    """ΔV = alpha/Q · w1 ⊗ w2, with O = a·b and I = c·d.

    w1 (a, c), or w1_a (a, Q) · w1_b (Q, c). w2 (b, d) or (b, d, k, k), or w2_a (b, Q) · w2_b (Q, d·K), or with a kernel
    t2 (Q, Q, k, k) its CP decomposition by w2_a (Q, b) and w2_b (Q, d). Q is 1 where no factor is of low rank.
    """

    factors = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    lokr_w1: Tensor | None
    lokr_w1_a: Tensor | None
    lokr_w1_b: Tensor | None
    lokr_w2: Tensor | None
    lokr_w2_a: Tensor | None
    lokr_w2_b: Tensor | None
    lokr_t2: Tensor | None

    @classmethod
    def factor_sizes(cls, shapes: Shapes) -> tuple[int, int]:
        left = cls._factor_size(shapes, "lokr_w1")
        if "lokr_t2" in shapes:
            kernel, b, d = (shapes[name] for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
            if len(kernel) != 4 or len(b) != 2 or len(d) != 2 or kernel[:2] != (b[0], d[0]):
                raise ValueError(f"lokr_t2 has shape {kernel}, lokr_w2_a {b} and lokr_w2_b {d}")
            right = b[1], d[1] * kernel[2] * kernel[3]
        else:
            right = cls._factor_size(shapes, "lokr_w2")
        return left[0] * right[0], left[1] * right[1]

    @classmethod
    def _factor_size(cls, shapes: Shapes, name: str) -> tuple[int, int]:
        if name in shapes:
            shape = shapes[name]
            if len(shape) not in (2, 4):
                raise ValueError(f"{name} has shape {shape}")
            return shape[0], torch.Size(shape[1:]).numel()
        check_rank(shapes, f"{name}_a", f"{name}_b")
        return shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]

    @property
    def rank(self) -> int:
        """Q: that of w2 where both factors are of low rank, as the writers count it; they are equal."""
        low = self.lokr_w2_b if self.lokr_w2_b is not None else self.lokr_w1_b
        return 1 if low is None else low.shape[0]

    def change(self) -> Delta:
        scale = self.alpha / self.rank
        w1 = scale * (self.lokr_w1 if self.lokr_w1 is not None else _product(self.lokr_w1_a, self.lokr_w1_b))  # (a, c)
        if self.lokr_t2 is None and self.lokr_w2_a is not None and self.lokr_w2_b is not None:
            up = torch.kron(w1, self.lokr_w2_a)  # (O, c·Q)
            if up.shape[1] <= min(self.shape):
                return Delta(up, torch.kron(torch.eye(w1.shape[1]).to(w1), self.lokr_w2_b))  # down (c·Q, I·K)
        return Delta.from_dense(torch.kron(w1, self._w2()))

    def _w2(self) -> Tensor:
        """w2 as (b, d·K): a row of ⊗ has all cells of a kernel next to each other, as a flattened weight has."""
        if self.lokr_w2 is not None:
            return self.lokr_w2.flatten(1)
        if self.lokr_t2 is None:
            return _product(self.lokr_w2_a, self.lokr_w2_b)
        return torch.einsum("pqkl,pb,qd->bdkl", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b).flatten(1)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor:
    assert a is not None and b is not None  # the shapes have been checked
    return a @ b
