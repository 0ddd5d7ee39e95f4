"""Concept tokens in a pipeline: words for the tokenizer, rows for the text encoder, positions for the gates.

The text encoder never sees an id beyond its vocabulary: concept ids are noted, replaced by an ordinary one, and their
embeddings laid over it afterwards. So nothing is resized, only the laid-over rows are ever trained, and the pooled
output of old CLIP configs, which looks for the *largest* id of a prompt, is not fooled.

Shapes: B prompts, T text positions, D embedding width.
"""

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion.adapters.adapter import Concept
from fusion.errors import TokenConflict
from fusion.models.names import components
from fusion.models.prompts import Positions, PromptReader

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def text_encoders(pipe: Any) -> dict[str, Any]:
    return {name: module for name, module in components(pipe).items() if name in TOKENIZERS}


def embedding_of(text_encoder: Any) -> nn.Embedding:
    """The token embedding, whatever the layout of the class around it."""
    return getattr(text_encoder, "_orig_mod", text_encoder).get_input_embeddings()


def initial_rows(pipe: Any, concept: Concept) -> dict[str, Tensor]:
    """Embedding rows (vectors, D) per text encoder, started from the noun's pieces.

    A whisper of noise (1 % of the embedding's spread, seeded by the token) tells `a <dog>` from `a dog`: prompts are
    recognised by content, and two concepts of one noun must not start identical.
    """
    rows: dict[str, Tensor] = {}
    for component, encoder in text_encoders(pipe).items():
        tokenizer, weight = (
            getattr(pipe, TOKENIZERS[component]),
            embedding_of(encoder).weight.detach().float(),
        )
        ids = tokenizer(concept.noun, add_special_tokens=False).input_ids if concept.noun else []
        pieces = weight[ids] if ids else weight.mean(dim=0, keepdim=True)  # (pieces, D)
        if concept.vectors == 1:
            start = pieces.mean(dim=0, keepdim=True)
        else:
            start = pieces[[i % len(pieces) for i in range(concept.vectors)]]
        generator = torch.Generator().manual_seed(int.from_bytes(concept.token.encode(), "big") % 2**63)
        noise = torch.randn(start.shape, generator=generator).to(start.device)
        rows[component] = start + 0.01 * weight.std() * noise
    return rows


class ConceptTokens:
    """All concepts attached to one pipeline; `close()` leaves it as found."""

    def __init__(self, pipe: Any, reader: PromptReader) -> None:
        # Weak: the table of installations lives by the pipeline, and must not keep it alive.
        self.pipe, self.reader = weakref.proxy(pipe), reader
        self._tokenizers = {name: getattr(pipe, TOKENIZERS[name]) for name in text_encoders(pipe)}
        self._owned: dict[int, tuple[tuple[Concept, ...], Mapping[str, Mapping[str, Tensor]]]] = {}
        self._words: dict[str, dict[int, tuple[str, int]]] = {}  # component -> id -> (token, which vector)
        self._overlay: dict[str, Tensor] = {}  # component -> (B, T) ids of the call under way
        self._hooks = [hook for name in self._tokenizers for hook in self._hook(name)]
        self._rebuild()

    def add(self, key: int, concepts: tuple[Concept, ...], rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Teach the pipeline the concepts of attachment `key`; `rows`: token -> component -> (vectors, D).

        Raises TokenConflict if a token is attached already, or is a word of the base.
        """
        attached = {concept.token for owned, _ in self._owned.values() for concept in owned}
        for concept in concepts:
            if concept.token in attached:
                raise TokenConflict(
                    f"{concept.token} is attached to this pipeline already; detach it first, or rename one: "
                    f"adapter.renamed({{'{concept.token}': '<another>'}})."
                )
            for tokenizer in self._tokenizers.values():
                if concept.token in tokenizer.get_vocab():
                    raise TokenConflict(f"{concept.token} is a word of this base's tokenizer; choose another token.")
        self._owned[key] = (concepts, rows)
        self._rebuild()

    def remove(self, key: int) -> None:
        """Forget the concepts of attachment `key`, if it has any."""
        if self._owned.pop(key, None) is not None:
            self._rebuild()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for component, tokenizer in self._tokenizers.items():
            setattr(self.pipe, TOKENIZERS[component], tokenizer)

    def _rebuild(self) -> None:
        """Give the pipeline copies of its own tokenizers that know exactly the attached concepts."""
        concepts = [c for owned, _ in self._owned.values() for c in owned]
        for component, original in self._tokenizers.items():
            tokenizer = copy.deepcopy(original) if concepts else original
            if concepts:
                tokenizer.add_tokens([piece for c in concepts for piece in c.pieces])
            words = {
                tokenizer.convert_tokens_to_ids(piece): (c.token, i)
                for c in concepts
                for i, piece in enumerate(c.pieces)
            }
            self._words[component] = words
            setattr(self.pipe, TOKENIZERS[component], tokenizer)

    def _row(self, component: str, token: str, vector: int) -> Tensor:
        for _, rows in self._owned.values():
            if token in rows:
                return rows[token][component][vector]
        raise KeyError(token)

    def _hook(self, component: str) -> list[Any]:
        encoder = text_encoders(self.pipe)[component]
        return [
            encoder.register_forward_pre_hook(self._before(component), with_kwargs=True),
            embedding_of(encoder).register_forward_hook(self._lay_over(component)),
            encoder.register_forward_hook(self._after(component)),
        ]

    def _before(self, component: str) -> Any:
        """Note the concept ids of this call and hide them from the text encoder."""

        def hook(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            ids = ids.view(-1, ids.shape[-1])
            self._overlay[component] = ids
            words = self._words[component]
            prompts = [_positions(row, words) for row in ids.tolist()]
            self.reader.begin_text(component, prompts, ids.shape[1], ids.device)
            # BOS: a word of every CLIP vocabulary, below EOS, so that the pooled position stays EOS's.
            ordinary = self._tokenizers[component].bos_token_id
            hidden = torch.isin(ids, torch.tensor(list(words), device=ids.device, dtype=ids.dtype))
            seen = ids.masked_fill(hidden, ordinary)
            if "input_ids" in kwargs:
                return args, {**kwargs, "input_ids": seen}
            return (seen, *args[1:]), kwargs

        return hook

    def _lay_over(self, component: str) -> Any:
        """Replace the embeddings at concept positions by the concepts' own rows."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            words = self._words[component]
            flat = self._overlay[component].flatten().tolist()
            at = [i for i, word in enumerate(flat) if word in words]
            if not at:
                return output
            rows = torch.stack([self._row(component, *words[flat[i]]).to(output) for i in at])  # (n, D)
            index = torch.tensor(at, device=output.device)
            return output.flatten(0, 1).index_copy(0, index, rows).view(output.shape)

        return hook

    def _after(self, component: str) -> Any:
        """Tell the reader what the prompts were encoded to, at every layer a pipeline may take (clip_skip, SDXL)."""

        def hook(encoder: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            ids = self._overlay[component]
            values = list(output.values()) if hasattr(output, "values") else list(output)
            tensors = [t for value in values for t in (value if isinstance(value, tuple | list) else (value,))]
            layers = [t[:, -1].detach() for t in tensors if isinstance(t, Tensor) and t.shape[:-1] == ids.shape]
            if len(layers) > 1:
                norm = next(m for name, m in encoder.named_modules() if name.endswith("final_layer_norm"))
                layers += [norm(layer) for layer in layers]
            words = self._words[component]
            self.reader.end_text(component, [_positions(row, words) for row in ids.tolist()], torch.stack(layers))

        return hook


def make_permanent(pipe: Any, concepts: tuple[Concept, ...], rows: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add concepts to the pipeline's own vocabulary, for baking: tokenizers and embeddings grow."""
    for component, encoder in text_encoders(pipe).items():
        tokenizer = getattr(pipe, TOKENIZERS[component])
        for concept in concepts:
            if tokenizer.add_tokens(list(concept.pieces)) != concept.vectors:
                raise TokenConflict(f"{concept.token} is a word of this base's tokenizer already; rename the concept.")
            encoder.resize_token_embeddings(len(tokenizer))
            ids = tokenizer.convert_tokens_to_ids(list(concept.pieces))
            weight = embedding_of(encoder).weight
            weight.data[ids] = rows[concept.token][component].to(weight)
        if concepts and encoder.config.eos_token_id == 2:
            # Old CLIP configs find the end of a prompt as its largest id, which now would be the concept's.
            encoder.config.eos_token_id = tokenizer.eos_token_id
            getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id


def _positions(ids: list[int], words: Mapping[int, tuple[str, int]]) -> Positions:
    found: dict[str, list[int]] = {}
    for position, word in enumerate(ids):
        if word in words:
            found.setdefault(words[word][0], []).append(position)
    return {token: tuple(positions) for token, positions in found.items()}
