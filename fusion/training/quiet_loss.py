"""The quiet loss: ΔW says nothing where it is not spoken to, so that even an ungated adapter leaves the rest alone.

    quiet = mean over layers of ‖ΔW X₀‖² / ‖W X₀‖²

X₀ are the base's own inputs at each layer for prompts without the concept: the training captions with its noun, with
other nouns, and with decoys, unknown words whose embeddings are random and as large as the concept's. Where ΔW X₀ is
zero in every layer the adapter says exactly what the base says. Their second moments are recorded once, before the
first step, so a step costs no further pass through the base: ‖ΔW X₀‖² = tr(ΔW C₀ ΔWᵀ), on factors. Gates play no part:
what is made quiet is the adapter as a plain LoRA has it, acting at every token.

Shapes: I in_features, Q rank of a delta.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Concept
from fusion.models.attachment import attach
from fusion.models.input_moments import CONCEPT_FREE, record_base
from fusion.models.layer_sites import matrix, sites
from fusion.models.pipeline import Pipeline
from fusion.training.config import TrainingConfig

NOUNS = (
    *("dog", "cat", "bird", "horse", "fish", "man", "woman", "child", "car", "house", "tree", "flower", "chair"),
    *("ball", "hat", "boat", "apple", "cup", "robot", "book"),
)
CAPTIONS = 16  # at most, of the training's own
STEPS = 4  # levels of noise


class Quiet:
    """Second moments of what the base hears, and the loss they give."""

    def __init__(self, pipe: Pipeline, config: TrainingConfig, adapter: Adapter, captions: Sequence[str]) -> None:
        """`adapter` is attached, and untrained: it changes nothing yet."""
        decoys = decoy_words(config, adapter)
        places, names = sites(pipe), list(adapter.layer_names)
        with attach(pipe, decoys):
            words = [concept.token for concept in decoys.info.concepts]
            met = record_base(pipe, names, quiet_prompts(config, captions, words), steps=STEPS, seed=config.seed)
        self.weight = config.quiet_loss_weight
        # C₀ (I, I), one tensor for all layers that hear the same, and ‖W X₀‖² of each layer.
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        shared: dict[int, Tensor] = {}
        for name, moment in met.items():
            base = matrix(places[name])
            if id(moment) not in shared:
                shared[id(moment)] = moment.free.to(base.device, torch.float32)
            free = shared[id(moment)]
            said = ((base.float() @ free) * base.float()).sum().clamp(min=torch.finfo(torch.float32).tiny)
            self.moments[name] = free, said

    def loss(self, adapter: Adapter) -> Tensor:
        """The weighted quiet loss, differentiable in the adapter's layers."""
        ratios = [loudness(adapter, name, free) / said for name, (free, said) in self.moments.items()]
        return self.weight * torch.stack(ratios).mean()


def loudness(adapter: Adapter, layer: str, moment: Tensor) -> Tensor:
    """tr(ΔW C ΔWᵀ) at one layer."""
    delta = adapter.layers[layer].delta()
    return ((delta.down @ moment @ delta.down.T) * (delta.up.T @ delta.up)).sum()


def decoy_words(config: TrainingConfig, adapter: Adapter) -> Adapter:
    """Unknown words with random embeddings of the size of the concept's own, as an adapter that changes no layer."""
    generator = torch.Generator("cpu").manual_seed(config.seed)
    concepts = tuple(Concept(f"<decoy-of-{config.token[1:-1]}-{i}>", "", config.num_vectors) for i in range(CAPTIONS))
    own = adapter.tokens[config.token]
    rows = {
        concept.token: {
            component: torch.randn(row.shape, generator=generator).to(row.device) * row.detach().square().mean().sqrt()
            for component, row in own.items()
        }
        for concept in concepts
    }
    return Adapter(AdapterInfo("decoys", adapter.info.base, concepts), (), rows)


def quiet_prompts(config: TrainingConfig, captions: Sequence[str], decoys: Sequence[str]) -> list[str]:
    """Every caption with noun, two other nouns and a decoy in the place of the token; and concept-free prompts."""
    own = list(dict.fromkeys(config.worded(text) for text in captions))
    chosen = own[:: -(-len(own) // CAPTIONS)]
    others = [noun for noun in NOUNS if noun != config.noun]
    prompts: list[str] = list(CONCEPT_FREE)
    for number, caption in enumerate(chosen):
        nouns = [config.noun, others[2 * number % len(others)], others[(2 * number + 1) % len(others)]]
        prompts += [caption.replace(config.token, word) for word in (*nouns, decoys[number % len(decoys)]) if word]
    return list(dict.fromkeys(prompts))
