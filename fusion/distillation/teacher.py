"""The teacher: the base with all adapters attached and gated. It answers prompts; it is attached only while it does.

Shapes: P prompts, E text encoders, T text positions, D embedding width, N rows, O out_features, Q rank.
"""

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, Branch, Concept, float32
from fusion.adapters.combination_checks import other_clip_skip
from fusion.config import TOKEN
from fusion.layer_names import TOKENIZERS
from fusion.methods.distill import gated_change
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import silent_loading
from fusion.models.tokens import embedding_of, text_encoders
from fusion.spectral.delta import Delta

logger = logging.getLogger(__name__)


class Answers(NamedTuple):
    """What P prompts are to the teacher. Every tensor has P rows."""

    ids: Mapping[str, Tensor]  # text encoder -> (P, T); pieces of concepts are counted on behind the vocabulary
    states: Tensor  # (P, T, D), all encoders' side by side
    pooled: Tensor | None  # (P, D) for SDXL
    owners: Tensor  # (P, E, T): the concept whose token stands there, by each tokenizer; -1 where none does

    def select(self, index: Tensor | slice) -> "Answers":
        ids = {name: tensor[index] for name, tensor in self.ids.items()}
        return Answers(ids, self.states[index], None if self.pooled is None else self.pooled[index], self.owners[index])

    def cut(self, length: int) -> "Answers":
        """The first positions alone, which do not depend on those behind them."""
        ids = {name: tensor[:, :length] for name, tensor in self.ids.items()}
        return Answers(ids, self.states[:, :length], self.pooled, self.owners[..., :length])

    def split(self, count: int) -> list["Answers"]:
        """At most `count` parts of whole prompts."""
        size = -(-len(self.states) // count)
        return [self.select(slice(start, start + size)) for start in range(0, len(self.states), size)]

    @classmethod
    def join(cls, parts: Sequence["Answers"]) -> "Answers":
        ids = {name: torch.cat([part.ids[name] for part in parts]) for name in parts[0].ids}
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            ids,
            torch.cat([part.states for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat([part.owners for part in parts]),
        )

    @property
    def size(self) -> int:
        """Bytes."""
        tensors = [*self.ids.values(), self.states, self.owners, *([] if self.pooled is None else [self.pooled])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Teacher:
    """Gated adapters on their base, with decoys: words with embeddings that change no layer."""

    def __init__(self, pipe: Pipeline, adapters: Sequence[Adapter], decoys: Adapter, clip_skip: int | None) -> None:
        self.pipe, self.adapters, self.decoys, self.clip_skip = pipe, adapters, decoys, clip_skip
        for adapter in adapters:
            if sentence := other_clip_skip(adapter, clip_skip or 0, "distilled"):
                logger.warning("%s Set the distillation's clip_skip to that of your pictures.", sentence)
        self.concepts: list[Concept] = [concept for adapter in adapters for concept in adapter.info.concepts]
        self.vocabulary = {name: embedding_of(encoder).num_embeddings for name, encoder in text_encoders(pipe).items()}
        self._ends = {name: int(getattr(pipe, TOKENIZERS[name]).eos_token_id) for name in self.vocabulary}
        self._branches: list[Branch] = [branch for adapter in adapters for branch in adapter.branches]
        tokens = [concept.token for concept in self.concepts]
        gates = [[float(token in branch.gate) for token in tokens] for branch in self._branches]
        self._gates = torch.tensor(gates, device=pipe.unet.device).view(len(gates), len(tokens))
        self._layers: dict[str, tuple[Delta, Tensor]] = {}
        everything = [*self.concepts, *decoys.info.concepts]
        self._pieces = {concept.token: " ".join(concept.pieces) for concept in everything}

    @contextmanager
    def attached(self) -> Generator[None]:
        pipe: Any = self.pipe
        name = "maybe_convert_prompt"
        with ExitStack() as stack, silent_loading():  # random prompts may be cut; that is no news
            for adapter in (*self.adapters, self.decoys):
                stack.enter_context(attach(self.pipe, adapter))
            # The pipeline's own method goes through all added tokens for every word: half the time of an answer.
            own = {name: vars(pipe)[name]} if name in vars(pipe) else {}  # set by the pipeline's owner
            stack.callback(vars(pipe).update, own)
            stack.callback(vars(pipe).pop, name)
            pipe.maybe_convert_prompt = self._expanded
            yield

    def _expanded(self, prompt: str | list[str], _tokenizer: object) -> str | list[str]:
        """Prompts with every vector of a concept, as the pipeline's `maybe_convert_prompt` writes them."""
        if not isinstance(prompt, str):
            return [str(self._expanded(text, _tokenizer)) for text in prompt]
        return TOKEN.sub(lambda match: self._pieces.get(match[0], match[0]), prompt)

    @torch.no_grad()
    def answer(self, prompts: Sequence[str]) -> Answers:
        """The answers to prompts, in half precision. The teacher has to be attached."""
        encoded = encode_prompts(self.pipe, prompts, self.clip_skip, chunks=1)
        ids, owners = dict[str, Tensor](), list[Tensor]()
        for component, size in self.vocabulary.items():
            ids[component], owner = self._ids(component, prompts, size)
            owners.append(owner)
        pooled = None if encoded.pooled is None else _half(encoded.pooled)
        return Answers(ids, _half(encoded.states), pooled, torch.stack(owners, dim=1))

    def _ids(self, component: str, prompts: Sequence[str], vocabulary: int) -> tuple[Tensor, Tensor]:
        """Ids (P, T) as the pipeline has them, concepts behind the vocabulary; and the concept at every position."""
        pipe: Any = self.pipe
        tokenizer = getattr(pipe, TOKENIZERS[component])
        texts = [pipe.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
        ids = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        result, owner, row = ids.clone(), torch.full_like(ids, -1, dtype=torch.int16), vocabulary
        for number, concept in enumerate([*self.concepts, *self.decoys.info.concepts]):
            for word in tokenizer.convert_tokens_to_ids(list(concept.pieces)):
                result[ids == word] = row
                row += 1
                if number < len(self.concepts):
                    owner[ids == word] = number
        device = self.pipe.unet.device
        return result.to(device), owner.to(device)

    def length(self, ids: Mapping[str, Tensor]) -> int:
        """The length of the longest of prompts (P, T), with the first position of padding."""
        ends = [(tensor == self._ends[name]).int().argmax(dim=1).max() for name, tensor in ids.items()]
        return int(torch.stack(ends).max()) + 2

    def presence(self, owners: Tensor) -> Tensor:
        """Which concepts the prompts hold, (P, concepts), 1 or 0."""
        numbers = torch.arange(len(self.concepts), device=owners.device)
        return (owners.flatten(1)[..., None] == numbers).any(dim=1).float()

    def rows(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        """The flattened rows (N,) that hold concepts, and which gated branches act there, (N, branches), 1 or 0."""
        by_row = owners.movedim(1, 2).flatten(0, 1)  # (P·T, E)
        rows = (by_row >= 0).any(dim=1).nonzero().squeeze(1)
        numbers = torch.arange(len(self.concepts), device=owners.device)
        concepts = (by_row[rows][..., None] == numbers).any(dim=1).float()  # (N, concepts)
        return rows, (concepts @ self._gates.T).clamp(max=1)

    def gated(self, layer: str, shape: tuple[int, int], states: Tensor, acts: Tensor) -> Tensor:
        """What the gated branches add at rows of one layer, (N, O), in float32; `states` (N, D) are the rows."""
        return gated_change(*self.branches(layer, shape), states, acts)  # pyright: ignore[reportCallIssue]

    def changes(self, layer: str) -> bool:
        """Whether any branch changes this layer."""
        return any(layer in branch.layers for branch in self._branches)

    def branches(self, layer: str, shape: tuple[int, int]) -> tuple[Delta, Tensor]:
        """The changes of all branches in one layer (O, I) as one ΔW, and the branch of each column of `up`."""
        if layer not in self._layers:
            self._layers[layer] = self._joined(layer, shape, self._gates.device)
        return self._layers[layer]

    def _joined(self, layer: str, shape: tuple[int, int], device: torch.device) -> tuple[Delta, Tensor]:
        total, owners = Delta.zero(*shape), list[int]()
        with torch.no_grad():
            for number, branch in enumerate(self._branches):
                if layer in branch.layers:
                    delta = float32(branch.layers[layer]).delta().detach() * branch.strength
                    total, owners = total + delta, [*owners, *[number] * delta.rank]
        return total.to(device), torch.tensor(owners, device=device, dtype=torch.long)


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor
