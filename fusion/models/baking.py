"""Adapters into a base's own weights and vocabulary: one-way."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fusion.adapters.adapter import Adapter, Concept
from fusion.errors import BaseMismatch, FusionError, GatingError, OutputError
from fusion.layer_names import TOKENIZERS
from fusion.models.attachment import effective_gates
from fusion.models.base_check import check_base, with_base_weights
from fusion.models.layer_sites import all_sites, components, is_quantised
from fusion.models.model_state import attached_state, state_of
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import silent_loading
from fusion.models.tokens import check_concepts, embedding_of, text_encoders
from fusion.output_files import check_output, output_group


def bake(pipe: Pipeline, adapter: Adapter, gating: str | None = None) -> None:
    """Add an adapter into the base's own weights and vocabulary. One-way; `save_model` keeps it.

    Raises GatingError for a gated adapter unless gating="none", since a weight cannot know which token it is given;
    BaseMismatch for a base that it does not fit or whose weights are quantised; FusionError if this adapter is baked in
    already, or anything is attached.
    """
    if gates := dict.fromkeys(token for gate in effective_gates(adapter, gating).values() for token in gate):
        raise GatingError(
            f"'{adapter.info.name}' is gated by {', '.join(gates)}; baked weights would act on every token. Attach it "
            "instead, or accept that with gating='none'."
        )
    if attached_state(pipe) is not None:
        raise FusionError("Adapters are attached to this pipeline; detach them before baking.")
    state, digest = state_of(pipe), adapter.digest()
    if digest in state.baked:
        raise FusionError(f"'{adapter.info.name}' is baked into this pipeline already; a second time would double it.")
    check_base(pipe, adapter, state.checks)
    table = all_sites(pipe)
    for name in adapter.layer_names:
        if isinstance(weight := table[name].module.weight, Tensor) and is_quantised(weight):
            raise BaseMismatch(
                f"{name} of this base is quantised; baked, it would have to be rounded again. Open the base in float16 "
                "or bfloat16."
            )
    _make_permanent(pipe, adapter.info.concepts, adapter.tokens)
    with torch.no_grad():
        for name, delta in with_base_weights(pipe, adapter).deltas().items():
            weight = table[name].module.weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(weight.float() + delta.to(weight.device).dense().reshape(weight.shape))
    state.baked.add(digest)


def save_model(pipe: Pipeline, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a pipeline as a diffusers folder, whole or not at all. Raises OutputError.

    A folder that exists is refused; with `overwrite` a model in it is replaced as a whole, anything else still refused.
    """
    models = [*components(pipe).values(), pipe.vae]
    size = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    target = check_model_output(path, size=size, overwrite=overwrite)
    try:
        with output_group(target) as group, silent_loading():
            pipe.save_pretrained(group / target.name)
    except SafetensorError as error:  # how its writer says that the disk is full
        raise OutputError(f"'{target}' cannot be written: {error}.") from error
    return target


def check_model_output(path: str | os.PathLike[str], *, size: int = 0, overwrite: bool = False) -> Path:
    """Raise OutputError now for a folder in which no model could be saved later."""
    target = check_output(path, folder=True, size=size, foreign=lambda _: "it is there already", overwrite=overwrite)
    if target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").is_file():
        raise OutputError(f"'{target}' is a folder of other files, which are not replaced; name another.")
    return target


def _make_permanent(pipe: Pipeline, concepts: Sequence[Concept], rows: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add concepts to the pipeline's own vocabulary, for baking: tokenizers and embeddings grow.

    Raises what check_concepts does, before anything is changed.
    """
    encoders: dict[str, Any] = dict(text_encoders(pipe))
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
