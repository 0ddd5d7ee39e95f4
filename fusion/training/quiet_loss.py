"""The quiet loss: ΔW is penalised on prompts without the concept, so that even an ungated adapter leaves them alone.

    L = weight · mean over layers of ‖ΔW X₀‖² / ‖W X₀‖²

X₀ are the base's own inputs at each layer for prompts without the concept: the training captions with its noun, with
other nouns, and with decoys, unknown words whose embeddings are random and as large as the concept's. Where ΔW X₀ is
zero in every layer, the output is the base's. Their second moments C₀ are recorded once, before the first step, so a
step costs no further pass through the base: ‖ΔW X₀‖² = tr(ΔW C₀ ΔWᵀ), on factors. Gates play no part: the adapter is
penalised as it would act at every token, like a plain LoRA.

Shapes: O out_features, I in_features, Q rank of a delta, L layers of a stack.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Concept
from fusion.adapters.layer_stacks import LayerStacks
from fusion.models.attachment import attach
from fusion.models.input_moments import BATCH, CONCEPT_FREE, record_base
from fusion.models.layer_sites import Site, matrix
from fusion.models.pipeline import Pipeline
from fusion.progress import OnProgress
from fusion.spectral.delta import Delta
from fusion.spectral.moments import Moment
from fusion.training.config import TrainingConfig

NOUNS = (
    *("dog", "cat", "bird", "horse", "fish", "man", "woman", "child", "car", "house", "tree", "flower", "chair"),
    *("ball", "hat", "boat", "apple", "cup", "robot", "book"),
)
MAX_CAPTIONS = 16  # of the training's own
NOISE_LEVELS = 4
_TINY = torch.finfo(torch.float32).tiny


class QuietLoss:
    """The second moments of the base's inputs without the concept; called, the loss that they give."""

    def __init__(
        self, pipe: Pipeline, config: TrainingConfig, adapter: Adapter, targets: Mapping[str, Site],
        captions: Sequence[str], resolution: int, stacks: LayerStacks, on_progress: OnProgress | None = None,
    ) -> None:  # fmt: skip
        """`adapter` is attached, and untrained: it changes nothing yet. `targets`: its layers in the base; `stacks`:
        the same layers, as a step computes them.

        Recording takes no more memory than a step does: `resolution` pixels, and at most as many prompts at a time.
        """
        decoys = decoy_words(config, adapter)
        with attach(pipe, decoys):
            words = [concept.token for concept in decoys.info.concepts]
            prompts = quiet_prompts(config, captions, words)
            recorded = record_base(
                pipe, list(adapter.layer_names), prompts, steps=NOISE_LEVELS, seed=config.seed,
                side=resolution // pipe.vae_scale_factor, batch=min(BATCH, config.train_batch_size),
                clip_skip=config.clip_skip or 0, on_progress=on_progress,
            )  # fmt: skip
        self.weight = config.quiet_loss_weight
        self.stacks = stacks
        self._moments = list(_stacked_moments(adapter, stacks, recorded, targets))

    def __call__(self) -> Tensor:
        """The weighted loss, a scalar, differentiable in the adapter's layers; inside `stacks.computed()`."""
        return self.weight * torch.cat([moments.ratios(self.stacks.stacked) for moments in self._moments]).mean()


class _StackMoments(NamedTuple):
    """Second moments of G·N layers of a stack, of which each N have the same inputs."""

    stack: int
    layers: Tensor | None  # (G·N,) which of the stack; None: all, in their order
    moments: Tensor  # C₀, (G, I, I)
    responses: Tensor  # ‖W X₀‖², (G·N,)

    def ratios(self, stacked: Sequence[Delta]) -> Tensor:
        """‖ΔW X₀‖² / ‖W X₀‖² of the layers (G·N,), as tr(ΔW C₀ ΔWᵀ)."""
        up, down = stacked[self.stack].up, stacked[self.stack].down  # (L, O, Q), (L, Q, I)
        if self.layers is not None:
            up, down = up.index_select(0, self.layers), down.index_select(0, self.layers)
        groups, size = self.moments.shape[0], self.moments.shape[-1]
        moved = (down.reshape(groups, -1, size) @ self.moments).view(down.shape)  # (G·N, Q, I)
        return ((moved @ down.mT) * (up.mT @ up)).sum((1, 2)) / self.responses


def _stacked_moments(
    adapter: Adapter, stacks: LayerStacks, recorded: Mapping[str, Moment], targets: Mapping[str, Site]
) -> Iterator[_StackMoments]:
    """What was `recorded` of every layer, by stacks and by how many layers of a stack have the same inputs."""
    names = {layer: name for name, layer in adapter.layers.items()}
    for position, stack in enumerate(stacks.stacks):
        alike: dict[int, list[int]] = {}  # layers of the stack by their inputs
        for k, layer in enumerate(stack.layers):
            alike.setdefault(id(recorded[names[layer]]), []).append(k)
        for count in {len(layers): None for layers in alike.values()}:
            groups = [layers for layers in alike.values() if len(layers) == count]
            order = [k for layers in groups for k in layers]
            bases = [matrix(targets[names[stack.layers[k]]]) for k in order]
            device = bases[0].device
            moments = torch.stack(
                [recorded[names[stack.layers[layers[0]]]].free.to(device, torch.float32) for layers in groups]
            )
            responses = [
                ((base.float() @ moments[number // count]) * base.float()).sum() for number, base in enumerate(bases)
            ]
            index = None if order == list(range(len(stack.layers))) else torch.tensor(order, device=device)
            yield _StackMoments(position, index, moments, torch.stack(responses).clamp(min=_TINY))


def decoy_words(config: TrainingConfig, adapter: Adapter) -> Adapter:
    """Unknown words with random embeddings of the size of the concept's own, as an adapter that changes no layer."""
    generator = torch.Generator("cpu").manual_seed(config.seed)
    concepts = tuple(
        Concept(f"<decoy-of-{config.token[1:-1]}-{i}>", "", config.num_vectors) for i in range(MAX_CAPTIONS)
    )
    rows = {
        concept.token: {
            component: torch.randn(row.shape, generator=generator).to(row.device) * row.detach().square().mean().sqrt()
            for component, row in adapter.tokens[config.token].items()
        }
        for concept in concepts
    }
    return Adapter(AdapterInfo("decoys", adapter.info.base, concepts), (), rows)


def quiet_prompts(config: TrainingConfig, captions: Sequence[str], decoys: Sequence[str]) -> list[str]:
    """Captions with the noun, two other nouns and a decoy instead of the token; and concept-free prompts."""
    unique = list(dict.fromkeys(config.with_token(text) for text in captions))
    chosen = unique[:: -(-len(unique) // MAX_CAPTIONS)]
    others = [noun for noun in NOUNS if noun != config.noun]
    prompts: list[str] = list(CONCEPT_FREE)
    for number, caption in enumerate(chosen):
        nouns = [config.noun, others[2 * number % len(others)], others[(2 * number + 1) % len(others)]]
        prompts += [caption.replace(config.token, word) for word in (*nouns, decoys[number % len(decoys)]) if word]
    return list(dict.fromkeys(prompts))
