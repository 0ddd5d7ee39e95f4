"""The student: the base's text encoders and projections with one plain LoRA, and embeddings of the concepts.

It shares the base's weights and nothing else: the pipeline is not touched, and others may draw with it meanwhile.

Shapes: B prompts, T text positions, D embedding width, O out_features, I in_features.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.adapters.adapter import Adapter
from fusion.adapters.layer import LayerOptions
from fusion.adapters.lora import LoraLayer
from fusion.layer_names import TOKENIZERS, component_of, sees_tokens
from fusion.models.denoising import Conditioning
from fusion.models.float32_layers import compute_in_float32
from fusion.models.layer_sites import matrix, sites, walk
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import family
from fusion.models.tokens import embedding_of, text_encoders
from fusion.spectral.slices import SpectralSlice

LAYER_TENSORS = 24  # of a text encoder's width, that the gradients of one of its layers need: 8, and 4 of four times it


class _LoraLinear(nn.Module):
    """W x + up (down x), or (W + up · down) x where that is less to compute."""

    lora: LoraLayer
    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, lora: LoraLayer) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        object.__setattr__(self, "lora", lora)
        # Gradients of W + ΔW cost a product as large as W; those through the factors three products of the rank.
        self.folded = 3 * lora.up.shape[1] * (base.in_features + base.out_features) > self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.lora.up, self.lora.down
        weight = self.weight if torch.is_autocast_enabled(x.device.type) else self.weight.to(x.dtype)
        if self.folded:
            return F.linear(x, weight + up @ down, self.bias)
        return F.linear(x, weight, self.bias) + F.linear(F.linear(x, down), up)


class _ConceptEmbedding(nn.Module):
    """The base's embeddings, with rows of its own at the ids behind the vocabulary."""

    weight: Tensor
    rows: nn.Parameter

    def __init__(self, base: nn.Embedding, rows: nn.Parameter, decoys: Tensor) -> None:
        super().__init__()
        self.weight, self.decoys = base.weight, decoys
        object.__setattr__(self, "rows", rows)
        self.ids: Tensor | None = None  # (B, T) of the call to come

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.ids is not None
        out, ids = F.embedding(hidden, self.weight).float(), self.ids.flatten()
        positions = (ids >= len(self.weight)).nonzero().squeeze(1)
        rows = F.embedding(ids[positions] - len(self.weight), torch.cat([self.rows, self.decoys]))
        return out.flatten(0, 1).index_copy(0, positions, rows).view(out.shape)


class Student:
    """What learns: `loras` by canonical layer name, and `rows` (vectors of all concepts, D) by text encoder."""

    def __init__(
        self, pipe: Pipeline, rows: Mapping[str, Tensor], decoys: Mapping[str, Tensor],
        *, rank: int, kv_rank: int, seed: int, clip_skip: int | None,
    ) -> None:  # fmt: skip
        self.loras: dict[str, LoraLayer] = {}
        self.rows = {component: nn.Parameter(row.detach().float().clone()) for component, row in rows.items()}
        # The keys' and values' own weights (O, I), by layer.
        self.weights = {n: matrix(site) for n, site in sites(pipe).items() if sees_tokens(n) and not _in_text(n)}
        self._hides = {name: int(getattr(pipe, TOKENIZERS[name]).bos_token_id) for name in text_encoders(pipe)}
        self._encoders: dict[str, Any] = {}
        for component, base in text_encoders(pipe).items():
            encoder: Any = _sharing(base)
            for name, site in list(walk(component, encoder)):
                if sees_tokens(name):
                    lora = self.loras[name] = _fresh(name, site.module.weight, rank, seed)  # pyright: ignore
                    setattr(site.parent, site.attribute, _LoraLinear(site.module, lora))  # pyright: ignore
            embedding = _ConceptEmbedding(embedding_of(encoder), self.rows[component], decoys[component].float())
            encoder.set_input_embeddings(embedding)
            self._encoders[component] = encoder
        for name, weight in self.weights.items():
            self.loras[name] = _fresh(name, weight, kv_rank, seed)
        self._penultimate, self._clip_skip = family(pipe) == "sdxl", clip_skip
        configs = [encoder.config for encoder in self._encoders.values()]
        hidden = sum(config.num_hidden_layers * config.hidden_size for config in configs)
        outputs = sum(weight.shape[0] for weight in self.weights.values())
        # What gradients need of a position of a prompt, in float32.
        self.position_bytes = 4 * (LAYER_TENSORS * hidden + 2 * outputs)

    def encode(self, ids: Mapping[str, Tensor]) -> Conditioning:
        """Prompts as the UNet is fed them, as `encode_prompt` of the pipelines makes them from ids (B, T)."""
        states, pooled = list[Tensor](), None
        for component, encoder in self._encoders.items():
            embedding = embedding_of(encoder)
            embedding.ids = ids[component]  # pyright: ignore[reportAttributeAccessIssue]
            hidden = ids[component].masked_fill(ids[component] >= len(embedding.weight), self._hides[component])
            output = encoder(hidden, output_hidden_states=self._penultimate or bool(self._clip_skip))
            states.append(self._states(encoder, output))
            pooled = output[0] if self._penultimate and output[0].ndim == 2 else None
        return Conditioning(torch.cat(states, dim=-1), pooled)

    def _states(self, encoder: nn.Module, output: Any) -> Tensor:
        """The layer that the UNet is fed, (B, T, D)."""
        if self._penultimate:
            return output.hidden_states[-2 - (self._clip_skip or 0)]
        if not self._clip_skip:
            return output[0]
        norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
        return norm(output.hidden_states[-1 - self._clip_skip])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that learns, under a stable name."""
        named = {f"{name}.{key}": p for name, lora in self.loras.items() for key, p in lora.named_parameters()}
        return named | {f"{component}.rows": row for component, row in self.rows.items()}


def concept_rows(pipe: Pipeline, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """The embeddings of all concepts, one after another, by text encoder."""
    device = pipe.unet.device
    rows = [adapter.tokens[concept.token] for adapter in adapters for concept in adapter.info.concepts]
    width = {name: embedding_of(encoder).embedding_dim for name, encoder in text_encoders(pipe).items()}
    return {
        name: torch.cat([row[name].detach().to(device, torch.float32) for row in rows] or [torch.zeros(0, size)])
        for name, size in width.items()
    }


def _in_text(layer: str) -> bool:
    return component_of(layer) in TOKENIZERS


def _fresh(name: str, weight: Tensor, rank: int, seed: int) -> LoraLayer:
    """An untrained layer with a random start of its own."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    directions = SpectralSlice(0, min(rank, *weight.shape))
    return LoraLayer.fresh(weight.float(), directions, options=LayerOptions(seed=number))


def _sharing(module: nn.Module) -> nn.Module:
    """A copy of a model with the same weights, frozen. What is small, norms and biases, is copied in float32."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.detach()
        if tensor.is_floating_point() and tensor.ndim < 2:
            value = value.float()
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    shared = copy.deepcopy(module, memo).eval()
    compute_in_float32(shared)
    return shared
