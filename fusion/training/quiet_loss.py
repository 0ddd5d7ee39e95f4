"""The quiet loss: ΔW is penalised on prompts without the concept, so that even an ungated adapter leaves them alone.

    L = weight · mean over layers of ‖ΔW X₀‖² / ‖W X₀‖²

X₀ are the base's own inputs at each layer for prompts without the concept: the training captions with its noun, with
other nouns, and with decoys, unknown words whose embeddings are random and as large as the concept's. Where ΔW X₀ is
zero in every layer, the output is the base's. Their second moments C₀ are recorded once, before the first step, so a
step costs no further pass through the base: ‖ΔW X₀‖² = tr(ΔW C₀ ΔWᵀ), on factors. Gates play no part: the adapter is
penalised as it would act at every token, like a plain LoRA.

Shapes: I in_features, Q rank of a delta.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Concept
from fusion.models.attachment import attach
from fusion.models.input_moments import BATCH, CONCEPT_FREE, record_base
from fusion.models.layer_sites import Site, matrix
from fusion.models.pipeline import Pipeline
from fusion.progress import OnProgress
from fusion.training.config import TrainingConfig

NOUNS = (
    *("dog", "cat", "bird", "horse", "fish", "man", "woman", "child", "car", "house", "tree", "flower", "chair"),
    *("ball", "hat", "boat", "apple", "cup", "robot", "book"),
)
MAX_CAPTIONS = 16  # of the training's own
NOISE_LEVELS = 4


class QuietLoss:
    """The second moments of the base's inputs without the concept; called, the loss that they give."""

    def __init__(
        self, pipe: Pipeline, config: TrainingConfig, adapter: Adapter, targets: Mapping[str, Site],
        captions: Sequence[str], resolution: int, on_progress: OnProgress | None = None,
    ) -> None:  # fmt: skip
        """`adapter` is attached, and untrained: it changes nothing yet. `targets`: its layers in the base.

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
        # C₀ (I, I), one tensor for all layers that have the same inputs, and ‖W X₀‖² of each layer.
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        shared: dict[int, Tensor] = {}
        for name, moment in recorded.items():
            base = matrix(targets[name])
            if id(moment) not in shared:
                shared[id(moment)] = moment.free.to(base.device, torch.float32)
            free = shared[id(moment)]
            response = ((base.float() @ free) * base.float()).sum().clamp(min=torch.finfo(torch.float32).tiny)
            self.moments[name] = free, response

    def __call__(self, adapter: Adapter) -> Tensor:
        """The weighted loss, a scalar, differentiable in the adapter's layers."""
        ratios = [squared_response(adapter, name, free) / base for name, (free, base) in self.moments.items()]
        return self.weight * torch.stack(ratios).mean()


def squared_response(adapter: Adapter, layer: str, moment: Tensor) -> Tensor:
    """‖ΔW X‖² at one layer, as tr(ΔW C ΔWᵀ)."""
    delta = adapter.layers[layer].delta()
    return ((delta.down @ moment @ delta.down.T) * (delta.up.T @ delta.up)).sum()


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
