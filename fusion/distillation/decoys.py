"""Decoys: words with random embeddings that stand for other people's concepts, which a LoRA has to leave alone.

An embedding starts at an ordinary word's, and is moved in a random direction, as far as the trained concepts are from
the words that they started from.

Shapes: V vectors of a concept, D embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Concept
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_info
from fusion.models.tokens import embedding_of, initial_rows, text_encoders

DISTANCES = 0.5, 1.5  # times that of a concept


def decoys_for(pipe: Pipeline, adapters: Sequence[Adapter], count: int, seed: int) -> Adapter:
    """An adapter of `count` decoys that changes no layer."""
    generator = torch.Generator().manual_seed(seed)
    owned = [(concept, adapter.tokens[concept.token]) for adapter in adapters for concept in adapter.info.concepts]
    concepts, rows = list[Concept](), dict[str, dict[str, Tensor]]()
    for number in range(count):
        concept, trained = owned[number % len(owned)]
        decoy = Concept(f"<decoy-{number}-of-{owned[0][0].token[1:-1]}>", "", concept.vectors)
        start = initial_rows(pipe, concept)
        share = float(torch.empty(1).uniform_(*DISTANCES, generator=generator))
        rows[decoy.token] = {}
        for component, encoder in text_encoders(pipe).items():
            table = embedding_of(encoder).weight.detach()
            word = table[int(torch.randint(len(table), (1,), generator=generator))].float().cpu()
            moved = (trained[component].float().cpu() - start[component].cpu()).norm(dim=1, keepdim=True)  # (V, 1)
            direction = torch.randn(trained[component].shape, generator=generator)  # (V, D)
            rows[decoy.token][component] = word + direction / direction.norm(dim=1, keepdim=True) * moved * share
        concepts.append(decoy)
    return Adapter(AdapterInfo("decoys", base_info(pipe), tuple(concepts)), (), rows)
