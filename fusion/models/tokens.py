"""Concept tokens in a pipeline: words for the tokenizer, rows for the text encoder, positions for the gates.

The text encoder never sees an id beyond its vocabulary: concept ids are noted, replaced by an ordinary one, and their
embeddings laid over it afterwards. So nothing is resized, only the laid-over rows are ever trained, and the pooled
output of old CLIP configs, which looks for the *largest* id of a prompt, is not fooled.

Shapes: B prompts, T text positions, D embedding width.
"""

import copy
import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion.adapters.adapter import Concept
from fusion.errors import BaseMismatch, TokenConflict
from fusion.models.gates import Positions, PromptTracker
from fusion.models.layer_sites import components
from fusion.models.pipeline import Pipeline

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def text_encoders(pipe: Pipeline) -> dict[str, Any]:
    return {name: module for name, module in components(pipe).items() if name in TOKENIZERS}


def embedding_of(text_encoder: Any) -> nn.Embedding:
    """The token embedding, whatever the layout of the class around it."""
    return getattr(text_encoder, "_orig_mod", text_encoder).get_input_embeddings()


def initial_rows(pipe: Pipeline, concept: Concept) -> dict[str, Tensor]:
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
        seed = hashlib.blake2b(concept.token.encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        noise = torch.randn(start.shape, generator=generator).to(start.device)
        rows[component] = start + 0.01 * weight.std() * noise
    return rows


class ConceptTokens:
    """All concepts attached to pipelines of the same components; `close()` leaves these as found."""

    def __init__(self, pipe: Pipeline, reader: PromptTracker) -> None:
        self.reader = reader
        self._encoders = text_encoders(pipe)
        self._originals = {name: getattr(pipe, TOKENIZERS[name]) for name in self._encoders}
        self._tokenizers = dict(self._originals)
        # Weak: the table of installations lives by the pipelines, and must not keep them alive.
        self._pipes: weakref.WeakSet[Any] = weakref.WeakSet()
        self._owned: dict[int, tuple[tuple[Concept, ...], Mapping[str, Mapping[str, Tensor]]]] = {}
        self._issued: list[str] = []  # every word ever added, in the order of their ids
        self._words: dict[str, dict[int, tuple[str, int]]] = {}  # component -> id -> (token, which vector)
        self._overlay: dict[str, Tensor] = {}  # component -> (B, T) ids of the call under way
        self._hooks = [hook for name in self._encoders for hook in self._hook(name)]
        self._rebuild()
        self.join(pipe)

    def join(self, pipe: Pipeline) -> None:
        """Give the tokenizers to another pipeline of the same components, too."""
        self._pipes.add(pipe)
        self._hand_out()

    def _hand_out(self) -> None:
        for pipe in self._pipes:
            for component, tokenizer in self._tokenizers.items():
                setattr(pipe, TOKENIZERS[component], tokenizer)

    def add(self, key: int, concepts: tuple[Concept, ...], rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Teach the pipeline the concepts of attachment `key`; `rows`: token -> component -> (vectors, D).

        Raises TokenConflict if a token is attached already, or is a word of the base; BaseMismatch for rows that do
        not fit.
        """
        attached = {concept.token for owned, _ in self._owned.values() for concept in owned}
        for concept in concepts:
            if concept.token in attached:
                raise TokenConflict(
                    f"{concept.token} is attached to this pipeline already; detach it first, or rename one: "
                    f"adapter.renamed({{'{concept.token}': '<another>'}})."
                )
        check_concepts(concepts, rows, self._encoders, self._originals)
        self._owned[key] = (concepts, rows)
        self._rebuild()

    def remove(self, key: int) -> None:
        """Forget the concepts of attachment `key`, if it has any."""
        if self._owned.pop(key, None) is not None:
            self._rebuild()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._tokenizers = self._originals
        self._hand_out()

    def _rebuild(self) -> None:
        """Give the pipelines copies of their own tokenizers that know exactly the attached concepts.

        A word keeps its id while anything is attached, and ids are not used again: a pipeline built in between from
        the same components may still have an older copy.
        """
        concepts = [c for owned, _ in self._owned.values() for c in owned]
        living = {piece: (c.token, i) for c in concepts for i, piece in enumerate(c.pieces)}
        self._issued += [piece for piece in living if piece not in self._issued]
        words = [piece if piece in living else f"\ue000{i}" for i, piece in enumerate(self._issued)]
        for component, original in self._originals.items():
            tokenizer = _with_words(original, words) if living else original
            self._words[component] = {tokenizer.convert_tokens_to_ids(piece): at for piece, at in living.items()}
            self._tokenizers[component] = tokenizer
        self._hand_out()

    def _row(self, component: str, token: str, vector: int) -> Tensor:
        return next(rows[token][component][vector] for _, rows in self._owned.values() if token in rows)

    def _hook(self, component: str) -> list[Any]:
        encoder = self._encoders[component]
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
            _check_known(ids, words, embedding_of(encoder).num_embeddings)
            prompts = [_positions(row, words) for row in ids.tolist()]
            self.reader.begin_text(component, prompts, ids.shape[1], ids.device)
            # BOS: a word of every CLIP vocabulary, below EOS, so that the pooled position stays EOS's.
            ordinary = self._originals[component].bos_token_id
            hidden = torch.isin(ids, torch.tensor(list(words), device=ids.device, dtype=ids.dtype))
            seen = ids.masked_fill(hidden, ordinary)
            if "input_ids" in kwargs:
                return args, {**kwargs, "input_ids": seen}
            return (seen, *args[1:]), kwargs

        return hook

    def _lay_over(self, component: str) -> Any:
        """Replace the embeddings at concept positions by the concepts' own rows."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            words, ids = self._words[component], self._overlay.get(component)
            if ids is None or ids.shape != output.shape[:-1]:  # somebody else's call, not the text encoder's
                return output
            flat = ids.flatten().tolist()
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
            ids = self._overlay.pop(component)
            values = list(output.values()) if hasattr(output, "values") else list(output)
            tensors = [t for value in values for t in (value if isinstance(value, tuple | list) else (value,))]
            encoded = [t for t in tensors if isinstance(t, Tensor) and t.shape[:-1] == ids.shape]
            resume = self.reader.resumption(component)
            for tensor in encoded:
                if tensor.requires_grad:
                    tensor.register_hook(resume)
            layers = [tensor[:, -1].detach() for tensor in encoded]
            if len(layers) > 1:
                norm = next(m for name, m in encoder.named_modules() if name.endswith("final_layer_norm"))
                layers += [norm(layer) for layer in layers]
            words = self._words[component]
            self.reader.end_text(component, [_positions(row, words) for row in ids.tolist()], torch.stack(layers))

        return hook


def check_concepts(
    concepts: Sequence[Concept],
    rows: Mapping[str, Mapping[str, Tensor]],
    encoders: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
) -> None:
    """Raise TokenConflict for a token that is a word of the base, BaseMismatch for rows that are not (vectors, D)."""
    for concept in concepts:
        for component, tokenizer in tokenizers.items():
            if any(_knows(tokenizer, piece) for piece in concept.pieces):
                raise TokenConflict(f"{concept.token} is a word of this base's tokenizer; choose another token.")
            needed = (concept.vectors, embedding_of(encoders[component]).embedding_dim)
            given = rows.get(concept.token, {}).get(component)
            if given is None or tuple(given.shape) != needed:
                found = "no embedding" if given is None else f"an embedding of shape {tuple(given.shape)}"
                raise BaseMismatch(
                    f"{concept.token} has {found} for the {component} of this base, which needs {needed}. It was "
                    "trained on another family."
                )


def make_permanent(pipe: Pipeline, concepts: Sequence[Concept], rows: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add concepts to the pipeline's own vocabulary, for baking: tokenizers and embeddings grow.

    Raises what check_concepts does, before anything is changed.
    """
    encoders = text_encoders(pipe)
    tokenizers = {component: getattr(pipe, TOKENIZERS[component]) for component in encoders}
    check_concepts(concepts, rows, encoders, tokenizers)
    pieces = [piece for concept in concepts for piece in concept.pieces]
    for component, encoder in encoders.items() if concepts else ():
        tokenizer = tokenizers[component]
        tokenizer.add_tokens(pieces)
        if embedding_of(encoder).num_embeddings < len(tokenizer):
            with torch.random.fork_rng(devices=[]):  # the new rows are drawn first, and overwritten below
                encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = embedding_of(encoder).weight
        embeddings = torch.cat([rows[concept.token][component] for concept in concepts])
        weight.data[tokenizer.convert_tokens_to_ids(pieces)] = embeddings.to(weight)
        if encoder.config.eos_token_id == 2:
            # Old CLIP configs find the end of a prompt as its largest id, which now would be the concept's.
            encoder.config.eos_token_id = tokenizer.eos_token_id
            getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id


def _knows(tokenizer: Any, word: str) -> bool:
    number = tokenizer.convert_tokens_to_ids(word)
    return number is not None and tokenizer.convert_ids_to_tokens(number) == word


def _with_words(original: Any, words: Sequence[str]) -> Any:
    """A copy of a tokenizer with more words. What is large and never changes, the base's vocabulary, is shared."""
    shared = {id(v): v for v in vars(original).values() if isinstance(v, list | dict) and len(v) > 1000}
    if (backend := getattr(original, "backend_tokenizer", None)) is not None:
        twin = type(backend)(backend.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            setattr(twin, part, getattr(backend, part))
        twin.add_tokens([word for _, word in sorted(backend.get_added_tokens_decoder().items())])
        shared[id(backend)] = twin
    tokenizer = copy.deepcopy(original, shared)
    tokenizer.add_tokens(list(words))
    return tokenizer


def _check_known(ids: Tensor, words: Mapping[int, tuple[str, int]], vocabulary: int) -> None:
    if unknown := [word for row in ids.tolist() for word in row if word >= vocabulary and word not in words]:
        raise TokenConflict(
            f"The prompt holds a concept token (id {unknown[0]}) that is not attached any more; build this pipeline "
            "again from the components of the one adapters are attached to."
        )


def _positions(ids: list[int], words: Mapping[int, tuple[str, int]]) -> Positions:
    found: dict[str, list[int]] = {}
    for position, word in enumerate(ids):
        if word in words:
            found.setdefault(words[word][0], []).append(position)
    return {token: tuple(positions) for token, positions in found.items()}
