"""Layers of ComfyUI's UNet that are given the prompt, the keys and values of cross-attention, with their branches.

A prompt is the same at every step, so what branches add there is computed at the first one and kept.

Shapes: B prompts, T positions, D embedding width, O out_features, n rows that branches change.
"""

import torch
from torch import Tensor, nn

from fusion.errors import GatingError
from fusion.models.adapted_layers import AdaptedLinear
from fusion.models.gates import PromptTracker, Rows, TokenRows

_MAX_PROMPTS = 4  # contexts whose changes are kept: a sampler has one or two, or as many as it combines
_Changes = dict[str, "tuple[Tensor, Tensor] | None"]  # path of a layer -> rows (n,) and their change (n, O)


class PromptLayers:
    """The prompts of the UNet's call under way, and what the branches of one MODEL add to layers given them."""

    def __init__(self, tracker: PromptTracker) -> None:
        self._tracker = tracker
        self._lengthened: TokenRows | None = None
        self._cache: list[tuple[Tensor, _Changes]] = []  # oldest first
        self.clear()

    def start(self, context: Tensor) -> Rows | None:
        """The rows of every concept in `context` (B, T', D'), which a call begins with. Raises GatingError."""
        self._tracker.start_unet(context)
        self._context = context
        for cached, changes in self._cache:
            same_form = (cached.shape, cached.dtype, cached.device) == (context.shape, context.dtype, context.device)
            if same_form and torch.equal(cached, context):
                self._changes = changes
                break
        else:
            self._changes = {}
            self._cache = [*self._cache, (context, self._changes)][-_MAX_PROMPTS:]
        return self.rows()

    def clear(self) -> None:
        """Keep nothing of earlier calls."""
        self._context = torch.empty(0)
        self._changes: _Changes = {}
        self._cache = []

    def rows(self) -> Rows | None:
        """Which rows of a layer's input belong to which concept."""
        return self._lengthened or self._tracker.rows("unet", by_token=True)

    def changed(
        self, path: str, layer: AdaptedLinear, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """A forward hook: the output (B, T', O) of the layer at `path` with its branches."""
        x = args[0]
        if x is not self._context:
            return self._patched(layer, x, output)
        if path not in self._changes:
            change = layer.with_branches(torch.zeros_like(output), x).flatten(0, -2)
            rows = change.any(dim=1).nonzero()[:, 0]
            self._changes[path] = (rows, change[rows]) if len(rows) else None
        if (cached := self._changes[path]) is None:
            return output
        return output.flatten(0, -2).index_add(0, *cached).view(output.shape)

    def _patched(self, layer: AdaptedLinear, x: Tensor, output: Tensor) -> Tensor:
        """The same where a patch of cross-attention has changed the prompt, or put more rows behind it."""
        rows = self.rows() if self._context.numel() else None  # nothing is gated where no context was started
        if not isinstance(rows, TokenRows) or not rows.tokens or x.shape[:2] == self._context.shape[:2]:
            return layer.with_branches(output, x)
        prompts, length = self._context.shape[:2]
        if x.ndim != 3 or x.shape[0] != prompts or not torch.equal(x[:, :length], self._context):
            token = sorted(rows.tokens)[0].partition(" ")[0]
            raise GatingError(
                f"A patch of this MODEL gives cross-attention {tuple(x.shape)} in place of the prompts' "
                f"{tuple(self._context.shape)}, not behind them, so the positions of {token} are not known; "
                "draw without the patch."
            )
        moved = {token: r // length * x.shape[1] + r % length for token, r in rows.rows.items()}
        self._lengthened = TokenRows(moved, prompts * x.shape[1])
        try:
            return layer.with_branches(output, x)
        finally:
            self._lengthened = None
