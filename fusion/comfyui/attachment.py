"""Adapters on ComfyUI's MODEL and CLIP: forward hooks on the layers, put in and taken out by ComfyUI's injections.

The branches, their gates and the recognition of prompts are those of `fusion.attach`. Every prompt that the CLIP
encodes is remembered with the positions of its concepts, and the UNet recognises it by content. So the nodes that
encode, combine, weight and crop stay ComfyUI's own, and a prompt that it does not recognise is refused.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusion.adapters.adapter import Adapter, float32
from fusion.comfyui.base import Clip, ModelPatcher, text_encoders, text_paths, unet_paths, widths
from fusion.comfyui.concept_tokenizer import gate_key, positions, rows_of
from fusion.comfyui.mask_cells import MaskCells
from fusion.comfyui.prompt_layers import PromptLayers
from fusion.errors import GatingError
from fusion.layer_names import component_of, sees_tokens
from fusion.models.adapted_layers import LayerBranch, Strength, adapted, outside_graphs
from fusion.models.gates import InputShapeError, PromptTracker
from fusion.models.hooks import Hooks
from fusion.spectral.delta import Delta

KEY = "spectral_fusion"  # of all that the nodes give to ComfyUI
_UNKNOWN = (
    "A prompt was not encoded with the CLIP of this MODEL's spectral adapters, or was mixed afterwards, as by "
    "Conditioning (Average). Connect both outputs of the loader, and use Conditioning (Combine)."
)

# The prompts that this process has encoded, by the widths of their text encoders: MODEL and CLIP meet here.
_trackers: dict[tuple[int, ...], PromptTracker] = {}
# ComfyUI's modules that hooks are on -> the id of the patcher that put them there, and the hooks.
_active: "weakref.WeakKeyDictionary[nn.Module, tuple[int, Hooks]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Entry:
    """One adapter of a chain of loaders."""

    adapter: Adapter
    strength: float  # of its layers in the UNet
    text_strength: float  # and in the text encoders
    mask: MaskCells | None = None  # where it acts in layers that see no tokens; None: on the whole picture


@dataclass(frozen=True)
class _LayerChange:
    """A branch in one layer."""

    path: str
    delta: Delta
    strength: float
    gate: tuple[str, ...]  # gate keys
    rows: Callable[[], Any]
    mask: MaskCells | None
    prompt: bool  # whether the layer is one of the UNet's that are given the prompt


class Attachment:
    """What the loaders of a chain have put on one MODEL or CLIP; a new one for every loader."""

    def __init__(self, entries: Sequence[Entry], tracker: PromptTracker) -> None:
        self.entries, self._tracker = tuple(entries), tracker
        adapters = [entry.adapter for entry in entries]
        self._keys = {gate_key(adapter, token): token for adapter in adapters for token in adapter.tokens}
        self._changes: list[_LayerChange] = []

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return tuple(entry.adapter for entry in self.entries)

    @torch.no_grad()
    def _add(self, paths: dict[str, str], text: bool) -> None:
        """The changes of all adapters in the layers of `paths`, canonical name -> path in ComfyUI's model."""
        for entry in self.entries:
            keys = {token: gate_key(entry.adapter, token) for token in entry.adapter.tokens}
            strength = entry.text_strength if text else entry.strength
            for branch in entry.adapter.branches:
                gate = tuple(keys[token] for token in branch.gate)
                for name, layer in branch.layers.items():
                    if name in paths and (delta := float32(layer).delta().detach()).rank:
                        rows = self._rows(component_of(name), sees_tokens(name))
                        mask = None if text or sees_tokens(name) else entry.mask
                        rows = rows if mask is None else partial(_masked, rows, mask)
                        prompt = not text and sees_tokens(name)
                        change = _LayerChange(paths[name], delta, branch.strength * strength, gate, rows, mask, prompt)
                        self._changes.append(change)

    def inject(self, patcher: ModelPatcher) -> None:
        """Put the hooks on the layers, in place of those that another patcher of the same model has left."""
        self.eject(patcher, of=None)
        hooks, layers = Hooks(), dict[tuple[str, MaskCells | None], Any]()
        for key, change in enumerate(self._changes):
            at = change.path, change.mask
            if at not in layers:
                module = patcher.model.get_submodule(change.path)
                layers[at] = adapted(module, change.rows)
                hooks.after(module, partial(outside_graphs, self._hook(change, layers[at])))
            layers[at].add(key, LayerBranch(change.delta, Strength(change.strength), change.gate))
        self._open(patcher.model, hooks)
        _active[patcher.model] = id(patcher), hooks

    def eject(self, patcher: ModelPatcher, of: int | None) -> None:
        """Take the hooks off again; with `of` only those of one patcher: a clone that goes leaves another's alone."""
        owner, hooks = _active.get(patcher.model, (None, None))
        if hooks is not None and of in (None, owner):
            del _active[patcher.model]
            hooks.remove()
        self._close()

    def _rows(self, component: str, by_token: bool) -> Callable[[], Any]:
        return partial(self._tracker.rows, component, by_token)

    def _hook(self, change: _LayerChange, layer: Any) -> Callable[..., Tensor]:
        """The forward hook of a layer."""
        return partial(_with_branches, layer)

    def _open(self, model: nn.Module, hooks: Hooks) -> None:
        """More hooks of the component."""

    def _close(self) -> None:
        """Keep nothing of earlier calls."""


class UNetAttachment(Attachment):
    def __init__(self, entries: Sequence[Entry], tracker: PromptTracker, model: ModelPatcher) -> None:
        super().__init__(entries, tracker)
        self._prompts = PromptLayers(tracker)
        self._add(unet_paths(model), text=False)
        self._gated = any(change.gate for change in self._changes)

    def call(
        self, executor: Callable[..., Tensor], x: Tensor, timesteps: Tensor, context: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """A wrapper of the UNet's call: the rows of every concept in `context` (B, T', D') are known before it."""
        for entry in self.entries:
            if entry.mask is not None:
                entry.mask.start(*x.shape[-2:])
        outside_graphs(self._start, context)
        return executor(x, timesteps, context, *args, **kwargs)

    def _start(self, context: Tensor) -> None:
        if not self._gated:
            return
        try:
            rows = self._prompts.start(context)
        except GatingError:
            raise GatingError(_UNKNOWN) from None
        if rows is not None and (unknown := sorted(set(rows.tokens) - self._keys.keys())):
            token = unknown[0].partition(" ")[0]
            raise GatingError(f"The prompt has {token} of an adapter that this MODEL lacks; connect the loader's.")

    def _rows(self, component: str, by_token: bool) -> Callable[[], Any]:
        return self._prompts.rows if by_token else super()._rows(component, by_token)

    def _hook(self, change: _LayerChange, layer: Any) -> Callable[..., Tensor]:
        return partial(self._prompts.changed, change.path, layer) if change.prompt else super()._hook(change, layer)

    def _close(self) -> None:
        self._prompts.clear()


class TextAttachment(Attachment):
    def __init__(self, entries: Sequence[Entry], tracker: PromptTracker, clip: Clip) -> None:
        super().__init__(entries, tracker)
        self._encoders = text_encoders(clip)
        for component in self._encoders:
            self._add(text_paths(clip, component), text=True)
        self._words = {component: rows_of(self.adapters, component) for component in self._encoders}

    def _open(self, model: nn.Module, hooks: Hooks) -> None:
        for component, name in self._encoders.items():
            hooks.before(model.get_submodule(name), partial(self._before, component))
            hooks.after(model.get_submodule(name), partial(self._after, component))

    def _prompts(self, component: str, module: Any, tokens: Sequence[Sequence[Any]]) -> list[Any]:
        width = module.transformer.get_input_embeddings().weight.shape[1]
        return [positions(chunk, self._words[component], width) for chunk in tokens]

    def _before(self, component: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """ComfyUI's text encoder is called with its chunks as lists of numbers and embeddings."""
        tokens = args[0]
        device = module.transformer.get_input_embeddings().weight.device
        self._tracker.start_text(component, self._prompts(component, module, tokens), len(tokens[0]), device)

    def _after(self, component: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._tracker.remember(component, self._prompts(component, module, args[0]), output[0][:, -1].detach()[None])


def _with_branches(layer: Any, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    try:
        return layer.with_branches(output, args[0])
    except InputShapeError:
        raise GatingError(
            f"A patch of this MODEL, such as HyperTile, gives a layer an input of shape {tuple(args[0].shape)}, in "
            "which the pictures of a concept cannot be identified; draw without the patch."
        ) from None


def _masked(rows: Callable[[], Any], mask: MaskCells) -> Any:
    whole = rows()
    return whole and mask.rows(whole)


def attach(model: ModelPatcher, clip: Clip, entry: Entry) -> tuple[ModelPatcher, Clip]:
    """Clones of both with one more adapter. The caller has checked that it fits."""
    from comfy.patcher_extension import PatcherInjection, WrappersMP

    sizes = widths(clip)
    tracker = _trackers.setdefault(tuple(sizes.values()), PromptTracker(sizes))
    model, clip = model.clone(), clip.clone()
    unet = UNetAttachment([*entries_of(model), entry], tracker, model)
    text = TextAttachment([*entries_of(clip.patcher), entry], tracker, clip)
    for patcher, attachment in ((model, unet), (clip.patcher, text)):
        patcher.set_attachments(KEY, attachment)
        injection = PatcherInjection(attachment.inject, partial(_eject, attachment))
        patcher.set_injections(KEY, [injection])
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, unet.call)
    return model, clip


def _eject(attachment: Attachment, patcher: ModelPatcher) -> None:
    attachment.eject(patcher, of=id(patcher))


def entries_of(patcher: ModelPatcher) -> tuple[Entry, ...]:
    """What the loaders before have put on a MODEL, or on the patcher of a CLIP."""
    attachment = patcher.get_attachment(KEY)
    return attachment.entries if attachment else ()
