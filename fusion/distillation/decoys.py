"""Decoys: words with random embeddings that stand for other people's concepts, which a LoRA has to leave alone.

An embedding starts at an ordinary word's, and is moved as far as the trained concepts are from the words that they
started from. Training moves embeddings where words differ, and the vectors of one concept alike; so do these: the
directions are mixed of differences between words, some of them common to a decoy's vectors.

Shapes: V vectors of a concept, D embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Concept
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_info
from fusion.models.tokens import embedding_of, initial_rows, text_encoders

DISTANCES = 0.6, 1.4  # times that of a concept
COMMON = 0.6  # share of a direction that all vectors of a decoy have; the squares of the shares add up to 1
MIXED = 8  # differences between words in one direction


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
            common, own = _direction(table, 1, generator), _direction(table, concept.vectors, generator)
            direction = COMMON * common + (1 - COMMON**2) ** 0.5 * own  # (V, D)
            rows[decoy.token][component] = word + direction / direction.norm(dim=1, keepdim=True) * moved * share
        concepts.append(decoy)
    return Adapter(AdapterInfo("decoys", base_info(pipe), tuple(concepts)), (), rows)


def _direction(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit vectors (count, D), each mixed of differences between words of the embedding `table`."""
    words = torch.randint(len(table), (2, count, MIXED), generator=generator)
    one, two = table[words.to(table.device)].float().cpu()  # (count, MIXED, D) each
    weights = torch.randn(count, MIXED, 1, generator=generator)
    mixed = ((one - two) * weights).sum(dim=1)
    return mixed / mixed.norm(dim=1, keepdim=True)
