"""Concept tokens in a pipeline: words for the tokenizer, rows for the text encoder, positions for the gates.

The text encoder never sees an id beyond its vocabulary: concept ids are recorded, replaced by an ordinary one, and the
embeddings at their positions are overlaid afterwards. So nothing is resized, only the overlaid rows are ever trained,
and the pooled output of old CLIP configs, which looks for the *largest* id of a prompt, is right.

Shapes: B prompts, T text positions, D embedding width.
"""

import copy
import hashlib
import operator
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion.adapters.adapter import Concept
from fusion.errors import BaseMismatch, TokenConflict
from fusion.layer_names import TOKENIZERS
from fusion.models.embedding_overlay import overlaid
from fusion.models.gates import Positions, PromptTracker
from fusion.models.hooks import Hooks
from fusion.models.layer_sites import components
from fusion.models.pipeline import Pipeline, uncompiled

# Words of detached concepts whose ids no other word gets, so that ids a program has stored are refused, not mistaken.
_RESERVED = 64


def text_encoders(pipe: Pipeline) -> dict[str, nn.Module]:
    return {name: uncompiled(module) for name, module in components(pipe).items() if name in TOKENIZERS}


def embedding_of(text_encoder: nn.Module) -> nn.Embedding:
    """The token embedding, whatever the layout of the class around it."""
    encoder: Any = uncompiled(text_encoder)
    return encoder.get_input_embeddings()


def initial_rows(pipe: Pipeline, concept: Concept) -> dict[str, Tensor]:
    """Embedding rows (vectors, D) per text encoder, started from the noun's pieces.

    A little noise (1 % of the embedding's spread, seeded by the token) makes `a <dog>` differ from `a dog`: prompts are
    recognised by content, and two concepts of one noun must not start identical.
    """
    rows: dict[str, Tensor] = {}
    for component, encoder in text_encoders(pipe).items():
        tokenizer, weight = getattr(pipe, TOKENIZERS[component]), embedding_of(encoder).weight.detach().float()
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


class _Calls(threading.local):
    """The ids (B, T) that each text encoder is called with in this thread."""

    def __init__(self) -> None:
        self.ids: dict[str, Tensor] = {}


class ConceptTokens:
    """The concepts attached to one set of components, from `open()` to `close()`."""

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        self._encoders, self._tracker = encoders, PromptTracker({})
        self._originals: dict[str, Any] = {}
        # One tokenizer for each component, kept for good: pipelines built of the same components follow it.
        self._tokenizers: dict[str, Any] = {}
        self._pipes: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()  # with their own
        self._concepts: dict[int, tuple[Concept, ...]] = {}
        self._rows: dict[str, Mapping[str, Tensor]] = {}  # token -> component -> (vectors, D)
        self._slots: list[str] = []  # every word with an id, in the order of ids
        self._detached: list[str] = []  # those of detached concepts, the oldest first
        self._listed: list[str] = []  # what the tokenizers know: the slots' words or what stands in for them
        self._words: dict[str, dict[int, tuple[str, int]]] = {}  # component -> id -> (token, which vector)
        self._calls = _Calls()

    def open(self, pipe: Pipeline, hooks: Hooks, tracker: PromptTracker) -> None:
        """Follow the prompts of a pipeline, and of all pipelines that join, in `tracker`."""
        self._tracker = tracker
        self._originals = {name: self._own(pipe, name) for name in self._encoders}
        self._words = {name: {} for name in self._encoders}
        for name, encoder in self._encoders.items():
            hooks.before(encoder, self._before_encoder(name))
            hooks.after(embedding_of(encoder), self._after_embedding(name))
            hooks.after(encoder, self._after_encoder(name))

    def close(self) -> None:
        self._set_words({})
        self._pipes.clear()

    def join(self, pipe: Pipeline) -> None:
        """Give the tokenizers to another pipeline of the same components, too."""
        if pipe not in self._pipes:
            self._pipes[pipe] = {name: self._own(pipe, name) for name in self._encoders}
            self._hand_out()

    def _own(self, pipe: Pipeline, component: str) -> Any:
        """The pipeline's own tokenizer; the base's where it was built with ours."""
        tokenizer = getattr(pipe, TOKENIZERS[component])
        return self._originals.get(component) if tokenizer is self._tokenizers.get(component) else tokenizer

    def _hand_out(self) -> None:
        for pipe, own in self._pipes.items():
            for component, tokenizer in own.items():
                setattr(pipe, TOKENIZERS[component], self._tokenizers[component] if self._rows else tokenizer)

    def add(self, key: int, concepts: tuple[Concept, ...], rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add the concepts of attachment `key`; `rows`: token -> component -> (vectors, D).

        Raises TokenConflict if a token is attached already, or is a word of the base; BaseMismatch for rows that do
        not fit.
        """
        for concept in concepts:
            if concept.token in self._rows:
                raise TokenConflict(
                    f"{concept.token} is attached to this pipeline already; detach it first, or rename one: "
                    f"adapter.renamed({{'{concept.token}': '<another>'}})."
                )
        check_concepts(concepts, rows, self._encoders, self._originals)
        if concepts:
            self._concepts[key] = concepts
            self._rows |= {concept.token: rows[concept.token] for concept in concepts}
            self._rebuild()

    def remove(self, key: int) -> None:
        """Remove the concepts of attachment `key`, if it has any."""
        if concepts := self._concepts.pop(key, ()):
            for concept in concepts:
                del self._rows[concept.token]
            self._rebuild()

    def _rebuild(self) -> None:
        """Let the tokenizers know exactly the attached concepts.

        A word has its id while it is attached, and until _RESERVED other words have been detached after it.
        """
        attached = {p: (c.token, i) for cs in self._concepts.values() for c in cs for i, p in enumerate(c.pieces)}
        self._detached = [word for word in self._detached if word not in attached]
        self._detached += [word for word in self._slots if word not in attached and word not in self._detached]
        for piece in attached:
            if piece not in self._slots and len(self._detached) > _RESERVED:
                self._slots[self._slots.index(self._detached.pop(0))] = piece
            elif piece not in self._slots:
                self._slots.append(piece)
        self._set_words(attached)

    def _set_words(self, attached: Mapping[str, tuple[str, int]]) -> None:
        # A word of a private-use character keeps the id of a detached one, which is spelled again.
        words = [word if word in attached else f"\ue000{i}" for i, word in enumerate(self._slots)]
        for component, original in self._originals.items():
            tokenizer = self._tokenizers.setdefault(component, object.__new__(type(original)))
            if not attached:
                tokenizer.__dict__ = dict(vars(original))
            elif self._listed and words[: len(self._listed)] == self._listed:
                tokenizer.add_tokens(words[len(self._listed) :])
            else:
                tokenizer.__dict__ = vars(_with_words(original, words)) | _as_original(original)
                tokenizer._encode_plus = self._encoding(type(original)._encode_plus, tokenizer)
            self._words[component] = {tokenizer.convert_tokens_to_ids(word): at for word, at in attached.items()}
        self._listed = words if attached else []
        self._hand_out()

    def _encoding(self, encode: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
        """`encode` of a tokenizer: by one thread at a time, and with all pieces of tokens that are not in lower case.

        A fast tokenizer first sets padding and truncation of its backend; a slow one encodes pairs by calling itself.
        """
        lock = threading.RLock()

        def encode_texts(text: Any, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return encode(tokenizer, self._spelled(text), *args, **kwargs)

        return encode_texts

    def _spelled(self, text: Any) -> Any:
        """<Dog> as <dog> <dog>_1 …: a tokenizer ignores case, where diffusers, which writes the pieces, does not."""
        if isinstance(text, list | tuple):
            return [self._spelled(part) for part in text]
        if not isinstance(text, str) or "<" not in text:
            return text
        pieces = {concept.token: " ".join(concept.pieces) for concept in self.concepts}
        return re.sub(r"<[\w-]+>(?!_\d)", lambda m: m[0] if m[0] in pieces else pieces.get(m[0].lower(), m[0]), text)

    def layout(self, component: str, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Of ids (N, T) on the host: the ids with an ordinary word where concepts stand; which of the V rows of all
        attached concepts stands at each position, (N·T, V) of 0 and 1; and the positions of each token, (N·T,).
        """
        words = self._words[component]
        _check_known(ids, words, embedding_of(self._encoders[component]).num_embeddings)
        concepts = ids.flatten()[:, None] == torch.tensor(list(words), dtype=ids.dtype)  # (N·T, V)
        hidden = ids.masked_fill(concepts.any(1).view_as(ids), self._originals[component].bos_token_id)
        of_token = {
            c.token: [k for k, (token, _) in enumerate(words.values()) if token == c.token] for c in self.concepts
        }
        return hidden, concepts.float(), {token: concepts[:, rows].any(1) for token, rows in of_token.items()}

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """All that are attached."""
        return tuple(concept for concepts in self._concepts.values() for concept in concepts)

    def _before_encoder(self, component: str) -> Any:
        """Record the concept ids of this call, and hide them from the text encoder."""

        def hook(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._tracker.start_batch(component):
                return None
            ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            ids = ids.view(-1, ids.shape[-1])
            self._calls.ids[component] = ids
            words = self._words[component]
            _check_known(ids, words, embedding_of(encoder).num_embeddings)
            prompts = [_positions(row, words) for row in ids.tolist()]
            self._tracker.start_text(component, prompts, ids.shape[1], ids.device)
            # BOS: a word of every CLIP vocabulary, below EOS, so that the pooled position stays EOS's.
            ordinary = self._originals[component].bos_token_id
            is_concept = torch.isin(ids, torch.tensor(list(words), device=ids.device, dtype=ids.dtype))
            hidden = ids.masked_fill(is_concept, ordinary)
            if "input_ids" in kwargs:
                return args, {**kwargs, "input_ids": hidden}
            return (hidden, *args[1:]), kwargs

        return torch.compiler.disable(hook)

    def _after_embedding(self, component: str) -> Any:
        """Replace the embeddings at concept positions by the concepts' own rows."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            words, ids = self._words[component], self._calls.ids.get(component)
            if (batch := self._tracker.batch) is not None:
                rows = [self._rows[token][component][vector] for token, vector in words.values()]
                return overlaid(output, batch.concepts[component], rows)
            if ids is None or ids.shape != output.shape[:-1]:  # a call by other code, not by the text encoder
                return output
            concepts = {i: words[word] for i, word in enumerate(ids.flatten().tolist()) if word in words}
            if not concepts:
                return output
            rows = [self._rows[token][component][vector].to(output) for token, vector in concepts.values()]
            index = torch.tensor(list(concepts), device=output.device)
            return output.flatten(0, 1).index_copy(0, index, torch.stack(rows)).view(output.shape)

        return torch.compiler.disable(hook)

    def _after_encoder(self, component: str) -> Any:
        """Remember what the prompts were encoded to, at every layer a pipeline may take (clip_skip, SDXL)."""

        def hook(encoder: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            batch = self._tracker.batch
            ids = self._calls.ids.pop(component) if batch is None else batch.ids[component]
            values = list(output.values()) if hasattr(output, "values") else list(output)
            tensors = [t for value in values for t in (value if isinstance(value, tuple | list) else (value,))]
            encoded = [t for t in tensors if isinstance(t, Tensor) and t.shape[:-1] == ids.shape]
            restore = self._tracker.restoring_hook(component)
            for tensor in encoded:
                if tensor.requires_grad:
                    tensor.register_hook(restore)
            if batch is not None:
                return
            layers = [tensor[:, -1].detach() for tensor in encoded]
            if len(layers) > 1:
                norm = next(m for name, m in encoder.named_modules() if name.endswith("final_layer_norm"))
                layers += [norm(layer) for layer in layers]
            words = self._words[component]
            prompts = [_positions(row, words) for row in ids.tolist()]
            self._tracker.remember(component, prompts, torch.stack(layers))

        return torch.compiler.disable(hook)


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
            row = rows.get(concept.token, {}).get(component)
            if row is None or tuple(row.shape) != needed:
                what = "no embedding" if row is None else f"an embedding of shape {tuple(row.shape)}"
                raise BaseMismatch(
                    f"{concept.token} has {what} for the {component} of this base, which needs {needed}. It was "
                    "trained on another family."
                )


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


def _as_original(original: Any) -> dict[str, Any]:
    """What makes copies, pickles and saved folders of a tokenizer those of the base: its text encoder knows no more."""
    return {
        "__deepcopy__": lambda memo: copy.deepcopy(original, memo),
        "__reduce_ex__": lambda _protocol: (operator.itemgetter(0), ((original,),)),
        "save_pretrained": original.save_pretrained,
    }


def _check_known(ids: Tensor, words: Mapping[int, tuple[str, int]], vocabulary: int) -> None:
    if unknown := [word for row in ids.tolist() for word in row if word >= vocabulary and word not in words]:
        raise TokenConflict(
            f"The prompt holds a concept token (id {unknown[0]}) that is not attached any more; encode the prompt "
            "again."
        )


def _positions(ids: list[int], words: Mapping[int, tuple[str, int]]) -> Positions:
    positions: dict[str, list[int]] = {}
    for position, word in enumerate(ids):
        if word in words:
            positions.setdefault(words[word][0], []).append(position)
    return {token: tuple(numbers) for token, numbers in positions.items()}
