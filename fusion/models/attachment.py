"""Adapters into pipelines: attach and detach, reversible and exact.

Knows nothing of files or of training; the training loop attaches live layers by the same code.
"""

import itertools
import logging
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fusion.adapters.adapter import Adapter, Branch, float32
from fusion.errors import ConfigError, FusionError, GatingError, UnknownName, closest
from fusion.layer_names import component_of, sees_tokens
from fusion.models.adapted_layers import Gate, LayerBranch, Strength, adapted
from fusion.models.base_check import check_base
from fusion.models.gates import PromptTracker, Routing
from fusion.models.layer_sites import Site, components, sites
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import ConceptTokens, embedding_of, text_encoders
from fusion.spectral.delta import Delta

logger = logging.getLogger(__name__)

GATINGS = ("tokens", "none")

_keys = itertools.count()


class AttachedState:
    """All that is attached to one set of components: adapted layers, concept tokens, the hooks that read prompts."""

    def __init__(self, pipe: Pipeline) -> None:
        self.parts = components(pipe)
        self.sites = sites(pipe)
        self.reader = PromptTracker({name: embedding_of(m).embedding_dim for name, m in text_encoders(pipe).items()})
        self.tokens = ConceptTokens(pipe, self.reader)
        self.gates = 0  # gated branches in the UNet: without any, its prompts need not be recognised
        self.layers: dict[str, Any] = {}  # canonical name -> AdaptedLinear or AdaptedConv1x1
        self.attachments = 0
        self._hooks = [
            pipe.unet.register_forward_pre_hook(self._read_prompts, with_kwargs=True),
            pipe.unet.register_forward_hook(self._remember_prompts),
        ]

    def _read_prompts(self, _unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.gates:
            embeds = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
            self.reader.begin_unet(embeds[0] if isinstance(embeds, tuple) else embeds)

    def _remember_prompts(self, _unet: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self.gates and output[0].requires_grad:
            output[0].register_hook(self.reader.resumption("unet"))

    def layer(self, name: str) -> Any:
        """The adapted layer at `name`, put there if need be."""
        if name not in self.layers:
            site = self.sites[name]
            self.layers[name] = adapted(site.module)
            setattr(site.parent, site.attribute, self.layers[name])
        return self.layers[name]

    def release(self, name: str, key: int) -> None:
        """Take one branch off; the last one off puts the base module back."""
        layer = self.layers[name]
        layer.remove(key)
        if not layer.branches:
            del self.layers[name]
            if (site := self._whereabouts(name, layer)) is not None:
                setattr(site.parent, site.attribute, self.sites[name].module)
            else:
                logger.warning("%s was replaced while an adapter was attached to it; it is left as it is.", name)

    def _whereabouts(self, name: str, layer: nn.Module) -> Site | None:
        """Where an adapted layer hangs now: PEFT, for one, may have wrapped it since."""
        first = self.sites[name]
        holder = getattr(first.parent, first.attribute)
        if holder is layer:
            return first
        below = ((parent, *child) for parent in holder.modules() for child in parent.named_children())
        return next((Site(*place) for place in below if place[2] is layer), None)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.tokens.close()


_installations: "weakref.WeakKeyDictionary[Any, AttachedState]" = weakref.WeakKeyDictionary()
_baked: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()


def _installation(pipe: Pipeline) -> AttachedState:
    """What is attached to this pipeline's components, shared by all pipelines built of the same ones."""
    if pipe in _installations:
        return _installations[pipe]
    mine = set(components(pipe).values())
    for here in _installations.values():
        theirs = set(here.parts.values())
        if mine == theirs:
            here.tokens.join(pipe)
            _installations[pipe] = here
            return here
        if mine & theirs:
            raise FusionError(
                "This pipeline shares some components with another that has adapters attached, and some not; detach "
                "those first."
            )
    _installations[pipe] = AttachedState(pipe)
    return _installations[pipe]


@contextmanager
def routing(pipe: Pipeline, routing: Routing) -> Generator[None]:
    """Gates of layers that see no tokens act region by region, as `routing` says; without adapters, nothing does."""
    reader = _installations[pipe].reader if pipe in _installations else None
    if reader is None:
        yield
        return
    reader.route(routing)
    try:
        yield
    finally:
        reader.route(None)


class Attachment:
    """An adapter in a pipeline. `detach()` restores the same module objects; also a context manager."""

    def __init__(self, pipe: Pipeline, adapter: Adapter, gates: Mapping[str, tuple[str, ...]], *, live: bool) -> None:
        self.adapter, self._pipe = adapter, pipe
        self._here = _installation(pipe)
        self._knobs: dict[str, Strength] = {}
        self._placed: list[tuple[str, int]] = []
        self._gated = sum(
            bool(gates[branch.name]) and any(component_of(name) == "unet" for name in branch.layers)
            for branch in adapter.branches
        )
        self._key: int | None = next(_keys)
        self._here.attachments += 1
        self._here.gates += self._gated
        try:
            self._here.tokens.add(self._key, adapter.info.concepts, adapter.tokens)
            for branch in adapter.branches:
                self._place(branch, gates[branch.name], live=live)
        except BaseException:
            self.detach()
            raise

    def _place(self, branch: Branch, gate: tuple[str, ...], *, live: bool) -> None:
        key, knob, reader = next(_keys), Strength(branch.strength), self._here.reader
        self._knobs[branch.name] = knob
        for name, layer in branch.layers.items():
            with torch.no_grad():
                source = layer.delta if live else float32(layer).delta().detach()
            if isinstance(source, Delta) and not source.rank:
                continue
            seen, component = sees_tokens(name), component_of(name)
            when = Gate(gate, lambda c=component, s=seen: reader.scope(c, s)) if gate else None
            self._here.layer(name).add(key, LayerBranch(source, knob, when))
            self._placed.append((name, key))

    def strength(self, name: str, value: float) -> None:
        """Set the strength of the branch or concept token `name`, or of the whole adapter by its name. Linear."""
        chosen = [
            k for b, k in zip(self.adapter.branches, self._knobs.values(), strict=True) if name in (b.name, *b.gate)
        ]
        if name == self.adapter.info.name:
            chosen = list(self._knobs.values())
        if not chosen:
            known = [
                *self._knobs,
                *(t for b in self.adapter.branches for t in b.gate),
                self.adapter.info.name,
            ]
            raise UnknownName(f"No branch is called '{name}'{closest(name, known)} There are: {', '.join(known)}.")
        for knob in chosen:
            knob.value = float(value)

    def detach(self) -> None:
        """Take the adapter out again, exactly. A second call does nothing."""
        if self._key is None:
            return
        for name, key in self._placed:
            self._here.release(name, key)
        self._here.tokens.remove(self._key)
        self._here.gates -= self._gated
        self._here.attachments -= 1
        if not self._here.attachments:
            self._here.close()
            for pipe in [pipe for pipe, here in _installations.items() if here is self._here]:
                del _installations[pipe]
        self._placed, self._key = [], None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()


def attach(pipe: Pipeline, adapter: Adapter, gating: str | None = None, *, live: bool = False) -> Attachment:
    """Attach an adapter to a pipeline; several may be attached at once, and detached in any order.

    `gating`: None as the file says, "tokens" to gate every branch by the adapter's own tokens, "none" to let all act
    everywhere. `live`: compute ΔW from the layers at every call (training) instead of once.
    Raises BaseMismatch for a foreign base, TokenConflict for a token in use, GatingError where a gate is impossible.
    """
    gates = effective_gates(adapter, gating)
    check_base(pipe, adapter)
    return Attachment(pipe, adapter, gates, live=live)


def effective_gates(adapter: Adapter, gating: str | None) -> dict[str, tuple[str, ...]]:
    """Branch name -> the tokens of its gate, under a gating asked for at attach."""
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
