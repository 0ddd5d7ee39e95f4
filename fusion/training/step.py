"""The gradients of one batch: what it reads is laid out on the device first, and then nothing waits for a GPU.

Between `inputs` and the loss nothing depends on values: no prompt is recognised, no number is read back.

Shapes: B examples, C latent channels, H W latent size.
"""

import hashlib
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from fusion.adapters.layer_stacks import LayerStacks
from fusion.models.denoising import Conditioning, encode_batch, encode_prompts, predict
from fusion.models.noise_schedule import forward_process
from fusion.models.pipeline import Pipeline
from fusion.models.prompt_layout import PromptBatch, prepared, prompt_batch
from fusion.training.config import TrainingConfig
from fusion.training.loss import denoising_loss, denoising_target, sample_noise, sample_timesteps, snr_weights
from fusion.training.quiet_loss import QuietLoss
from fusion.training.training_data import TrainingData


class StepInputs(NamedTuple):
    """A batch, on the device."""

    noisy: Tensor  # (B, C, H, W)
    timesteps: Tensor  # (B,)
    target: Tensor  # of the prediction, (B, C, H, W)
    weights: Tensor  # (B,), how much each example counts
    mask: Tensor  # (B, 1, H, W), how much each position counts
    time_ids: Tensor  # (B, 6), what SDXL is conditioned on
    prompts: PromptBatch
    conditioning: Conditioning | None  # of prompts that need not be encoded in the step


class BatchGradients:
    """The gradients of one training's batches, in the parameters of an adapter that is attached."""

    def __init__(
        self, pipe: Pipeline, config: TrainingConfig, data: TrainingData, accelerator: Accelerator,
        stacks: LayerStacks, quiet_loss: QuietLoss | None, *, trains_text: bool,
    ) -> None:  # fmt: skip
        self._pipe, self._config, self._data, self._accelerator = pipe, config, data, accelerator
        self._stacks, self._quiet_loss = stacks, quiet_loss
        names = ("prediction_type", "rescale_betas_zero_snr")
        others = {name: value for name in names if (value := getattr(config, name)) is not None}
        self._noise = forward_process(pipe, **others)  # the base's
        self._caches_text = not trains_text and not config.shuffle_caption
        self._text_cache: dict[str, Conditioning] = {}

    def inputs(self, number: int) -> StepInputs:
        """Batch `number`: a function of the seed and that number alone."""
        config, device = self._config, self._accelerator.device
        generator = _generator(config.seed, number)
        latents, mask, time_ids, captions, weights = self._data.batch(number, generator)
        noise = sample_noise(latents.shape, config.noise_offset, generator).to(device)
        steps = sample_timesteps(len(latents), self._noise.config["num_train_timesteps"], generator).to(device)
        noisy = self._noise.add_noise(latents, noise, steps)  # pyright: ignore[reportArgumentType]
        if config.snr_gamma:
            weights = weights * snr_weights(self._noise, steps, config.snr_gamma)
        target, sizes = denoising_target(self._noise, latents, noise, steps), torch.tensor(time_ids, device=device)
        prompts = prompt_batch(self._pipe, captions)
        return StepInputs(noisy, steps, target, weights, mask, sizes, prompts, self._cached(captions))

    def _cached(self, captions: list[str]) -> Conditioning | None:
        """Encoded captions where nothing in the text encoder is trained and their number is small."""
        if not self._caches_text:
            return None
        with torch.no_grad():
            for caption in captions:
                if caption not in self._text_cache:
                    self._text_cache[caption] = encode_prompts(self._pipe, [caption], self._config.clip_skip)
        parts = [self._text_cache[caption] for caption in captions]
        return Conditioning.join(parts) if len({part.states.shape[1] for part in parts}) == 1 else None

    def add(self, inputs: StepInputs, *, last: bool) -> Tensor:
        """Add a batch's gradients, and after the `last` of a step those of the quiet loss; returns the batch's loss."""
        config, loss = self._config, self._quiet_loss if last else None
        with prepared(self._pipe, inputs.prompts), self._stacks.computed():
            with self._accelerator.autocast():
                batch_loss = self._loss(inputs) / config.gradient_accumulation_steps
            self._accelerator.backward(batch_loss + loss() if loss else batch_loss)
        return batch_loss.detach()

    def release(self) -> None:
        """Give back what batches leave in a GPU's memory: nothing, where no graphs are captured."""

    def _loss(self, inputs: StepInputs) -> Tensor:
        text = inputs.conditioning or encode_batch(self._pipe, inputs.prompts, self._config.clip_skip)
        prediction = predict(self._pipe, inputs.noisy, inputs.timesteps, text, inputs.time_ids)
        return denoising_loss(prediction, inputs.target, weights=inputs.weights, mask=inputs.mask)


def _generator(seed: int, number: int) -> torch.Generator:
    name = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(name[:7], "big"))
