"""What adapters have to be for a distillation, what they bring to it, and what it leaves as it is."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fusion.adapters.adapter import Adapter, Branch
from fusion.adapters.combination_checks import check_bases, check_tokens
from fusion.errors import BaseMismatch, ConfigError, GatingError, TokenConflict
from fusion.layer_names import TOKENIZERS, component_of, sees_tokens
from fusion.models.base_check import check_base
from fusion.models.pipeline import Pipeline, check_resident
from fusion.models.pipelines import base_info
from fusion.models.prompt_chunks import check_writes_vectors

logger = logging.getLogger(__name__)


def check_distillable(pipe: Pipeline, adapters: Sequence[Adapter]) -> None:
    """Raise for adapters that cannot be distilled together on this base, before anything is computed.

    Others may be attached meanwhile; not when the distillation begins.
    """
    if not adapters:
        raise ConfigError("There is nothing to distill; give at least one adapter.")
    check_resident(pipe, "A distillation")
    check_writes_vectors(pipe)
    check_bases(adapters)
    check_tokens(adapters)
    here = base_info(pipe)
    for adapter in adapters:
        name, base = adapter.info.name, adapter.info.base
        if not adapter.info.concepts:
            raise TokenConflict(
                f"'{name}' has no concept token, so a LoRA cannot learn when it should act; leave it out."
            )
        if ungated := [branch.name for branch in adapter.branches if not branch.gate] or not adapter.branches:
            which = f"branch '{ungated[0]}' of '{name}'" if isinstance(ungated, list) else f"'{name}'"
            raise GatingError(
                f"{which} has no gate, and acts on every word as a plain LoRA does: there is nothing to distill. "
                "Export it as it is, or fuse it by another method."
            )
        if base is not None and base.family != here.family:
            raise BaseMismatch(
                f"'{name}' was trained on {base.name} ({base.family}), but '{here.name}' ({here.family}) is open; "
                "distill on the adapter's own base: --base."
            )
        check_base(pipe, adapter)
    if unfed := [layer for adapter in adapters for layer in adapter.layer_names if not _fed(layer)]:
        logger.warning(
            "%d layers are not fed by the prompt alone (%s, …): their changes are kept as they are, without gates.",
            len(dict.fromkeys(unfed)), unfed[0],
        )  # fmt: skip


def _fed(layer: str) -> bool:
    """Whether a layer is given nothing but the prompt."""
    return component_of(layer) in TOKENIZERS or sees_tokens(layer)


def unfed_branches(adapters: Sequence[Adapter], strengths: Sequence[float]) -> Iterator[Branch]:
    """What the adapters change in layers that prompts do not feed, ungated, under names of their own."""
    number = 0
    for adapter, strength in zip(adapters, strengths, strict=True):
        for branch in adapter.branches:
            layers = {name: layer for name, layer in branch.layers.items() if not _fed(name)}
            if layers:
                number += 1
                name = f"{branch.name} (layers without tokens, {number})"
                yield replace(branch, name=name, layers=layers, gate=(), strength=branch.strength * strength)


def own_captions(adapters: Sequence[Adapter]) -> list[str]:
    """The prompts that adapters were trained with, as far as their files have them, with {token}."""
    captions = [str(adapter.info.provenance.settings.get("instance_prompt", "")) for adapter in adapters]
    captions = [caption.replace("[trigger]", "{token}") for caption in captions]
    return sorted({caption for caption in captions if "{token}" in caption})
