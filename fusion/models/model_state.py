"""What is attached to the components of a pipeline, kept on the components themselves.

Every component points to one AttachedState, past nn.Module's registry; copies and pickles do not take it along.
"""

import itertools
import logging
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusion.errors import ConfigError, FusionError
from fusion.layer_names import TOKENIZERS, component_of, sees_tokens
from fusion.models.adapted_layers import OPERATOR, LayerBranch, adapted, outside_graphs
from fusion.models.base_check import PassedChecks
from fusion.models.gates import PromptTracker
from fusion.models.hooks import Hooks
from fusion.models.layer_sites import Site, components
from fusion.models.pipeline import Pipeline, uncompiled
from fusion.models.tokens import ConceptTokens, embedding_of, text_encoders

logger = logging.getLogger(__name__)

_STATE = "_spectral_fusion"  # the attribute of a component that points to its state
_numbers = itertools.count()
_states: "weakref.WeakValueDictionary[int, AttachedState]" = weakref.WeakValueDictionary()  # operators take no objects


class AttachedState:
    """All that is attached to one set of components: adapted layers, concept tokens, the hooks that read prompts.

    Every component points to it. It stays when everything is detached, with what is known of the base by then.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.components = _modules(pipe)
        self.tracker = PromptTracker({})  # a new one from the first attachment to the last
        self.checks = PassedChecks()
        states = [state for module in self.components.values() if (state := module.__dict__.get(_STATE))]
        self.baked: set[str] = set().union(*(state.baked for state in states))  # digests of adapters
        self.attachments = 0
        self.handles: list[Any] = []  # an Attachment for each
        self.denoiser_gates = 0  # attachments with gates in the UNet: without any, its prompts need not be recognised
        self.tokens = ConceptTokens(text_encoders(pipe))
        self._unet = uncompiled(pipe.unet)
        self._attention: list[Any] = [m for m in self._unet.modules() if hasattr(m, "processor")]
        self._layers: dict[str, tuple[Site, Any]] = {}  # canonical name -> where an adapted layer was put
        self._hooks = Hooks()
        self._number = torch.tensor(next(_numbers))
        _states[int(self._number)] = self
        for module in self.components.values():
            object.__setattr__(module, _STATE, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy or a pickle of a component is the base's, with nothing attached

    def open(self, pipe: Pipeline) -> None:
        """Count an attachment; the first one puts in the hooks."""
        self.check_projections()
        if not self.attachments:
            widths = {name: embedding_of(m).embedding_dim for name, m in text_encoders(pipe).items()}
            self.tracker = PromptTracker(widths)
            self.tokens.open(pipe, self._hooks, self.tracker)
            self._hooks.before(self._unet, self._before_unet)
            self._hooks.after(self._unet, self._after_unet)
        self.attachments += 1
        self.tokens.join(pipe)

    def close(self) -> None:
        """Count an attachment less; the last one takes out the hooks."""
        self.attachments -= 1
        if not self.attachments:
            self._hooks.remove()
            self.tokens.close()

    def _before_unet(self, _unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        embeds = embeds[0] if isinstance(embeds, tuple) else embeds
        if not torch.compiler.is_compiling():
            self.start_unet(embeds)
        elif torch.is_grad_enabled():
            outside_graphs(self.start_unet, embeds)
        else:  # no layer can run before the operator, since all are given its outputs
            leaves, structure = tree_flatten((args, kwargs))
            inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            outputs = iter(_prompts_operator(inputs, embeds, self._number))
            return tree_unflatten([next(outputs) if isinstance(x, Tensor) else x for x in leaves], structure)
        return None

    def start_unet(self, embeds: Tensor) -> None:
        """Recognise the prompts of a call. Raises ConfigError where the UNet goes past the adapted layers."""
        self.check_projections()
        if self.denoiser_gates:
            self.tracker.start_unet(embeds)

    def check_projections(self) -> None:
        """Raise ConfigError where diffusers' fused projections take the place of the layers that adapters change."""
        if any(type(module.processor).__name__.startswith("Fused") for module in self._attention):
            raise ConfigError("Adapters cannot act through fused projections; call pipe.unfuse_qkv_projections().")

    def _after_unet(self, _unet: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            outside_graphs(self._restore_in_backward, output[0])

    def _restore_in_backward(self, prediction: Tensor) -> None:
        if self.denoiser_gates and prediction.requires_grad:
            prediction.register_hook(self.tracker.restoring_hook("unet"))

    def add_branch(self, name: str, site: Site, key: int, branch: LayerBranch) -> None:
        """Attach a branch to the layer at `site`, which the first one replaces by an adapted layer."""
        if name not in self._layers:
            component, by_token = component_of(name), sees_tokens(name)
            repeats = by_token and component not in TOKENIZERS  # the UNet gives it the prompt at every step
            rows = partial(self.tracker.rows, component, by_token)
            layer = adapted(site.module, rows, self.tracker.outputs if repeats else None)
            self._layers[name] = site, layer
            setattr(site.parent, site.attribute, layer)
        self._layers[name][1].add(key, branch)

    def remove_branch(self, name: str, key: int) -> None:
        """Take one branch off; the last one off puts the base module back."""
        first, layer = self._layers[name]
        layer.remove(key)
        if not layer.branches:
            del self._layers[name]
            if (site := _current_site(first, layer)) is not None:
                setattr(site.parent, site.attribute, layer.base)
            else:
                logger.warning("%s was replaced while an adapter was attached to it; it is left as it is.", name)


def _modules(pipe: Pipeline) -> dict[str, nn.Module]:
    return {name: uncompiled(module) for name, module in components(pipe).items()}


def state_of(pipe: Pipeline) -> AttachedState:
    """The state of a pipeline's components, made where there is none, shared by all pipelines of the same ones.

    Raises FusionError where only some of them are another pipeline's that has adapters attached.
    """
    modules = _modules(pipe)
    first, *others = [module.__dict__.get(_STATE) for module in modules.values()]
    if first is not None and first.components == modules and all(other is first for other in others):
        return first
    if attached_state(pipe) is not None:
        raise FusionError(
            "This pipeline shares some components with another that has adapters attached, and some not; detach "
            "those first."
        )
    return AttachedState(pipe)


def attached_state(pipe: Pipeline) -> AttachedState | None:
    """The state of what is attached to any component of a pipeline."""
    states = [module.__dict__.get(_STATE) for module in _modules(pipe).values()]
    return next((state for state in states if state is not None and state.attachments), None)


def _current_site(first: Site, layer: nn.Module) -> Site | None:
    """Where an adapted layer is now: PEFT, for one, may have wrapped it since."""
    holder = first.module
    if holder is layer:
        return first
    below = ((Site(parent, name), child) for parent in holder.modules() for name, child in parent.named_children())
    return next((site for site, child in below if child is layer), None)


@torch.library.custom_op("spectral_fusion::start_unet", **OPERATOR)
def _prompts_operator(inputs: list[Tensor], embeds: Tensor, number: Tensor) -> list[Tensor]:
    """Recognise the prompts of a compiled UNet's call, and copy its inputs."""
    _states[int(number)].start_unet(embeds.detach())
    return [tensor.clone() for tensor in inputs]


@_prompts_operator.register_fake
def _shapes(inputs: list[Tensor], embeds: Tensor, number: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in inputs]
