"""The prompts of a training step, laid out on the device before the models run.

Where tokens stand in a batch is known from its captions. So inside a step no id is looked up, no prompt is recognised
and nothing waits for a GPU; and, but for rows on a CPU, every tensor has a shape that the batch's size decides alone.

Shapes: B prompts of n chunks each, N = B·n chunks, T text positions, V rows of attached concepts, D embedding width.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion.layer_names import TOKENIZERS
from fusion.models.gates import MaskedRows, PictureRows, Rows, TokenRows
from fusion.models.model_state import attached_state
from fusion.models.pipeline import Pipeline
from fusion.models.prompt_chunks import EMPTY, check_writes_vectors, split_prompt
from fusion.models.tokens import text_encoders


class PromptBatch(NamedTuple):
    count: int  # B
    ids: dict[str, Tensor]  # component -> (N, T) int64, with an ordinary word where concepts stand
    concepts: dict[str, Tensor]  # component -> (N·T, V), 1 where a position has a row of a concept, else 0
    layers: dict[str, dict[bool, Rows]]  # component -> whether its layers see tokens -> the rows of each token there

    def rows(self, component: str) -> dict[bool, Rows]:
        """The rows of each token in the layers of a component that see tokens (True), and in its other layers."""
        return self.layers[component]


def prompt_batch(pipe: Pipeline, prompts: Sequence[str]) -> PromptBatch:
    """B prompts of any length for the pipeline as it is now, all in as many chunks as the longest takes."""
    split = [[chunk.text for chunk in split_prompt(pipe, prompt)] for prompt in prompts]
    number, device = max(map(len, split)), pipe.unet.device
    texts = [text for one in split for text in [*one, *[EMPTY.text] * number][:number]]
    batch, state = PromptBatch(len(prompts), {}, {}, {}), attached_state(pipe)
    positions: dict[str, dict[str, Tensor]] = {}  # component -> token -> (N·T,) of bool, where it stands
    for component in text_encoders(pipe):
        ids = token_ids(pipe, component, texts)
        if state:
            ids, concepts, positions[component] = state.tokens.layout(component, ids)
            batch.concepts[component] = concepts.to(device)
        batch.ids[component] = ids.to(device)
    if state:
        encoders = list(positions.values())
        unet = {token: torch.stack([masks[token] for masks in encoders]).any(0) for token in encoders[0]}
        for component, masks in {**positions, "unet": unet}.items():
            count = len(prompts) if component == "unet" else len(texts)
            holders = {token: mask.view(count, -1).any(1) for token, mask in masks.items()}
            batch.layers[component] = {by: _rows(part, device, by) for by, part in ((True, masks), (False, holders))}
    return batch


def has_fixed_kernels(device: torch.device) -> bool:
    """Whether all batches of one shape have the same kernels, which a GPU can repeat; a CPU computes fewer rows."""
    return device.type != "cpu"


def _rows(masks: dict[str, Tensor], device: torch.device, by_token: bool) -> Rows:
    """The rows of layers at which the masks (n,) of bool are true: positions of tokens, or else chunks and prompts."""
    if has_fixed_kernels(device):
        return MaskedRows({token: mask.to(device) for token, mask in masks.items()})
    rows = {token: mask.nonzero()[:, 0].to(device) for token, mask in masks.items() if mask.any()}
    size = len(next(iter(masks.values()), ()))
    if by_token:
        return TokenRows(rows, size)
    return PictureRows({token: [(row, 0) for row in numbers.tolist()] for token, numbers in rows.items()}, size)


def token_ids(pipe: Pipeline, component: str, texts: Sequence[str]) -> Tensor:
    """The ids of texts of one chunk each, (N, T), as the pipelines of diffusers make them."""
    tokenizer = getattr(pipe, TOKENIZERS[component])
    check_writes_vectors(pipe)
    words = pipe.maybe_convert_prompt(list(texts), tokenizer)  # pyright: ignore[reportAttributeAccessIssue]
    limit = tokenizer.model_max_length
    return tokenizer(words, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids


def encode_ids(pipe: Pipeline, ids: dict[str, Tensor], clip_skip: int | None) -> tuple[Tensor, Tensor | None]:
    """What `encode_prompt` of StableDiffusionPipeline and StableDiffusionXLPipeline does with ids (N, T).

    Returns states (N, T, D) and, of XL, pooled states of the second text encoder. diffusers 0.42 itself looks for the
    last norm in `text_encoder.text_model` where clip_skip is set, which transformers has not since 5.6.
    """
    states, pooled, skipped, is_xl = list[Tensor](), None, clip_skip or 0, hasattr(pipe, "text_encoder_2")
    encoders = {component: getattr(pipe, component) for component in text_encoders(pipe)}
    for component, encoder in encoders.items():
        output: Any = encoder(ids[component], output_hidden_states=bool(is_xl or skipped))
        if is_xl:
            pooled = output[0] if output[0].ndim == 2 else pooled
            states.append(output.hidden_states[-2 - skipped])
        elif skipped:
            norm = next(m for name, m in encoder.named_modules() if name.endswith("final_layer_norm"))
            states.append(norm(output.hidden_states[-1 - skipped]))
        else:
            states.append(output[0])
    return torch.cat(states, dim=-1).to(list(encoders.values())[-1].dtype), pooled


@contextmanager
def prepared(pipe: Pipeline, batch: PromptBatch) -> Generator[None]:
    """For the block, in this thread, the pipeline's models are called with the prompts of `batch` and no others."""
    if (state := attached_state(pipe)) is None:
        yield
        return
    state.tracker.set_batch(batch)
    try:
        yield
    finally:
        state.tracker.set_batch(None)
