"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, so that every direction of a weight moves.

For a weight seen as a matrix (m, n): U = momentum's polar factor, W ← W - rate · 0.2 √max(m, n) · U. A convolution
(O, I, 3, 3) is flattened to (O, 9 I): `torch.optim.Muon` takes matrices only. Vectors and embeddings go to AdamW.
At equal time it was worth 7 dB in the autoencoder, and it is the reason that hours on a laptop are enough.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at zero: singular values of 0.001 come near 1 in five steps
STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """The polar factor of a matrix, roughly: its singular values come out between 0.7 and 1.2.

    Newton-Schulz, X ← (a + b XXᵀ + c (XXᵀ)²) X. All factors are polynomials in one Gram matrix and commute, so the
    steps are taken on that small square and applied to X once: a third of the work for wide matrices.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # (m, n), m ≤ n
    start = wide.float() / (wide.float().norm() + 1e-7)
    gram = start @ start.T  # (m, m)
    eye = torch.eye(len(gram), device=gram.device)
    total = eye
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        factor = a * eye + b * gram + c * (gram @ gram)
        total = factor @ total
        gram = factor @ gram @ factor
    result = total @ start
    return (result if matrix.shape[0] <= matrix.shape[1] else result.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)  # (m, n)
                update = orthogonalise(nesterov) * (0.2 * max(nesterov.shape) ** 0.5)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"])


def optimizers(model: nn.Module, rate: float, *, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """Muon for the hidden weights; AdamW for vectors, embeddings and the layers that meet pixels or latents."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        narrow = weight.ndim < 2 or min(weight.flatten(1).shape) < 16
        (rest if narrow or "embedding" in name or name.endswith(OUTER) else hidden).append(weight)
    return [
        Muon(hidden, rate, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


OUTER = ("conv_in.weight", "conv_out.weight")
