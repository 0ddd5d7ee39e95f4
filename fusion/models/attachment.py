"""Adapters into pipelines: attach and detach, reversible and exact.

Knows nothing of files or of training; the training loop attaches live layers by the same code.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType

import torch

from fusion.adapters.adapter import Adapter, Branch, checked_strengths, float32
from fusion.adapters.layer import AdapterLayer
from fusion.adapters.layer_stacks import LayerStacks
from fusion.errors import ConfigError, GatingError, UnknownName, closest
from fusion.layer_names import TOKENIZERS, component_of
from fusion.models.adapted_layers import LayerBranch, Strength
from fusion.models.base_check import check_base, with_base_weights
from fusion.models.layer_sites import all_sites
from fusion.models.model_state import AttachedState, attached_state, state_of
from fusion.models.pipeline import Pipeline
from fusion.models.prompt_chunks import check_writes_vectors
from fusion.spectral.delta import Delta

GATINGS = ("tokens", "none")

_keys = itertools.count()
_lock = threading.RLock()  # threads attach and detach one after another
# ΔW of layers that have been attached, with the state of the tensors that it was computed from.
_deltas: "weakref.WeakKeyDictionary[AdapterLayer, tuple[object, Delta]]" = weakref.WeakKeyDictionary()


class Attachment:
    """An adapter in a pipeline. `detach()` restores the same module objects; also a context manager."""

    _is_in = False  # not while `detached` has it out

    def __init__(
        self, pipe: Pipeline, adapter: Adapter, gates: Mapping[str, tuple[str, ...]], *,
        live: bool | LayerStacks,
    ) -> None:  # fmt: skip
        self.adapter, self._gates, self._live = adapter, gates, live
        self._strengths = {branch.name: Strength(branch.strength) for branch in adapter.branches}
        self._branches: list[tuple[str, int]] = []
        self._key = next(_keys)
        gated = [name for b in adapter.branches if gates[b.name] for name in b.layers]
        self._denoiser_gates = int(any(component_of(name) not in TOKENIZERS for name in gated))
        with _lock:
            state = state_of(pipe)
            check_base(pipe, adapter, state.checks)
            if any(concept.vectors > 1 for concept in adapter.info.concepts):
                check_writes_vectors(pipe)
            state.open(pipe)
            self._state: AttachedState | None = state
            state.handles.append(self)
            try:
                self._put_in(pipe)
            except BaseException:
                self.detach()
                raise

    def _put_in(self, pipe: Pipeline) -> None:
        if (state := self._state) is None:
            return
        state.denoiser_gates += self._denoiser_gates
        self._is_in = True
        state.tokens.add(self._key, self.adapter.info.concepts, self.adapter.tokens)
        for branch in with_base_weights(pipe, self.adapter).branches:
            self._add(pipe, state, branch, self._gates[branch.name])

    def _take_out(self) -> None:
        state, names, self._branches = self._state, self._branches, []
        if state is None or not self._is_in:
            return
        self._is_in = False
        for name, key in names:
            state.remove_branch(name, key)
        state.tokens.remove(self._key)
        state.denoiser_gates -= self._denoiser_gates

    def _add(self, pipe: Pipeline, state: AttachedState, branch: Branch, gate: tuple[str, ...]) -> None:
        key, table = next(_keys), all_sites(pipe)
        for name, layer in branch.layers.items():
            source = self._source(layer)
            if isinstance(source, Delta) and not source.rank:
                continue
            state.add_branch(name, table[name], key, LayerBranch(source, self._strengths[branch.name], gate))
            self._branches.append((name, key))

    def _source(self, layer: AdapterLayer) -> Callable[[], Delta] | Delta:
        if isinstance(self._live, LayerStacks):
            return partial(self._live.delta, layer)
        return layer.delta if self._live else _fixed_delta(layer)

    def strength(self, name: str, value: float) -> None:
        """Set the strength of the branch or concept token `name`, or of the whole adapter by its name. Linear.

        Raises UnknownName, ConfigError for what is no finite number.
        """
        (strength,) = checked_strengths([self.adapter], [value])
        branches = self.adapter.branches
        chosen = [b.name for b in branches if name in (b.name, *b.gate) or name == self.adapter.info.name]
        if not chosen:
            known = [*self._strengths, *(t for b in branches for t in b.gate), self.adapter.info.name]
            raise UnknownName(f"No branch is called '{name}'{closest(name, known)} There are: {', '.join(known)}.")
        for branch in chosen:
            self._strengths[branch].value = strength

    def detach(self) -> None:
        """Take the adapter out again, exactly. A second call does nothing."""
        with _lock:
            if (state := self._state) is None:
                return
            self._take_out()
            self._state = None
            state.handles.remove(self)
            state.close()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()


@torch.no_grad()
def _fixed_delta(layer: AdapterLayer) -> Delta:
    """ΔW of a layer as it is now, computed once for as long as none of its tensors changes."""
    tensors = layer.tensors()
    if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors):
        return float32(layer).delta().detach()  # changes of these are not counted
    # Fused optimizers do not count versions up, but move the first number.
    first = [tensor.reshape(-1)[:1].tolist() for tensor in tensors[:1]]
    state = first, [(id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in tensors]
    if (cached := _deltas.get(layer)) is None or cached[0] != state:
        cached = _deltas[layer] = state, float32(layer).delta().detach()
    return cached[1]


def attach(
    pipe: Pipeline, adapter: Adapter, gating: str | None = None, *, live: bool | LayerStacks = False
) -> Attachment:
    """Attach an adapter to a pipeline; several may be attached at once, and detached in any order.

    `gating`: None as the file says, "tokens" to gate every branch by the adapter's own tokens, "none" to let all act
    everywhere. `live`: compute ΔW from the layers at every call (training) instead of once; `LayerStacks` of the layers
    compute it for all at once.
    Raises BaseMismatch for a foreign base, TokenConflict for a token in use, GatingError where a gate is impossible.
    """
    return Attachment(pipe, adapter, effective_gates(adapter, gating), live=live)


@contextmanager
def detached(pipe: Pipeline) -> Generator[None]:
    """For the block, the pipeline without the adapters that are attached to it; then the same are attached again.

    So others can use a pipeline between two steps of a training, with an adapter of the same token too. The prompts
    that the attached adapters have been given stay known.
    """
    state = attached_state(pipe)
    attachments: list[Attachment] = list(state.handles) if state else []
    with _lock:
        for attachment in attachments:
            attachment._take_out()  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        with _lock:
            for attachment in attachments:
                attachment._put_in(pipe)  # pyright: ignore[reportPrivateUsage]


def effective_gates(adapter: Adapter, gating: str | None) -> dict[str, tuple[str, ...]]:
    """Branch name -> the tokens of its gate, for a gating chosen at attach."""
    if gating is not None and gating not in GATINGS:
        raise ConfigError(f"gating is 'tokens' or 'none', got '{gating}'{closest(gating, GATINGS)}")
    if gating is None:
        return {branch.name: branch.gate for branch in adapter.branches}
    if gating == "none":
        return {branch.name: () for branch in adapter.branches}
    own = tuple(concept.token for concept in adapter.info.concepts)
    if not own:
        raise GatingError(f"'{adapter.info.name}' has no concept token, so nothing can gate it; use gating='none'.")
    return {branch.name: branch.gate or own for branch in adapter.branches}
