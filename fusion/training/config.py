"""The settings of a training, under the names of the diffusers training scripts where these have one."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from fusion.config import (
    MAX_BATCH,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    MAX_WEIGHT,
    NAME,
    TOKEN,
    StrictModel,
    listing,
    read_toml,
    to_toml,
)
from fusion.errors import ConfigError
from fusion.training.caption_text import with_token

MAX_RESOLUTION = 4096  # pixels
MAX_REPEATS = 10_000
RATES = ("learning_rate", "text_encoder_lr", "token_lr")
Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]

# What may be another when a training is resumed; every other setting shapes the adapter (`lasting_settings`).
MAY_CHANGE = {
    # Where things are. What is found there is compared instead: the base's name, the pictures, the slice.
    *("pretrained_model_name_or_path", "base_config", "pretrained_vae_model_name_or_path"),
    *("instance_data_dir", "class_data_dir", "library", "output_dir", "output_name"),
    *("caption_extension", "resume_from_checkpoint", "exclusive_slice"),
    # How the training is watched and what is written of it.
    *("validation_prompt", "num_validation_images", "validation_steps", "report_to"),
    *("checkpointing_steps", "checkpoints_total_limit", "save_precision"),
    # Memory and time. Class pictures, drawn sample_batch_size at a time, are compared themselves.
    *("gradient_checkpointing", "cuda_graphs", "deterministic", "cache_latents", "sample_batch_size"),
}


class TrainingConfig(StrictModel):
    """Settings of one training. Defaults follow the paper's runs on Stable Diffusion 1.5 (arXiv 2405.13952).

    Flat and frozen. What the user has not set may come from the base's `fusion.toml`: `with_base_defaults`.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    names_or_paths = (
        "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "resume_from_checkpoint"
    )  # fmt: skip
    aliases: ClassVar = {
        **{"base": "pretrained_model_name_or_path", "placeholder_token": "token"},
        "train_data_dir": "instance_data_dir",
    }
    users_own = (
        *("token", "noun", "revision", "variant", "output_name", "report_to"),
        # What is written, drawn and deleted beside the adapter.
        *("checkpointing_steps", "checkpoints_total_limit", "save_precision", "validation_prompt"),
        *("num_validation_images", "with_prior_preservation", "class_prompt", "num_class_images"),
    )
    groups: ClassVar = {
        "base": "pretrained_model_name_or_path",
        "concept": "token",
        "pictures": "instance_data_dir",
        "adapter": "adapter_type",
        "optimisation": "optimizer",
        "prior preservation": "with_prior_preservation",
        "isolation": "quiet_loss_weight",
        "speed and memory": "mixed_precision",
        "previews": "validation_prompt",
        "run": "output_dir",
    }

    pretrained_model_name_or_path: str | None = None
    """Base model: a diffusers folder, hub id or .safetensors checkpoint. Default: the embedded pocket base."""
    revision: str | None = None
    """Branch, tag or commit of a base from the hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""
    base_config: Path | None = None
    """Diffusers folder with configs for a base in a single file. Default: those of its family."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the base predicts. Default: what it says itself."""
    rescale_betas_zero_snr: bool | None = None
    """Noise of zero terminal SNR, and trailing timesteps. Default: what the base says itself."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE: a folder, hub id or .safetensors file. Default: the base's own."""

    token: str
    """The concept's word in prompts, in angle brackets: <dog>."""
    noun: str = Field("", max_length=200)
    """Ordinary word whose embedding initialises the token's, such as dog. Recommended."""
    num_vectors: int = Field(1, ge=1, le=75)
    """Embedding rows, and so text positions, the token takes."""

    instance_data_dir: Path
    """Folder of pictures of the concept, with captions in name.txt or metadata.jsonl if there are any."""
    instance_prompt: str = Field("a {token}", max_length=MAX_PROMPT)
    """Caption of the pictures that have none; {token} stands for the token."""
    trigger_word: str | None = Field(None, max_length=200, pattern=r"\S")
    """The concept's name in prompts and captions of another program: it becomes the token, unless that is there too.
    Captions with neither begin with the token."""
    caption_extension: str = Field(".txt", pattern=r"^[\w.-]{1,20}$")
    """Ending of caption files."""
    shuffle_caption: bool = False
    """Put the tags of a caption, what is between commas, into another order at each use."""
    keep_tokens: int = Field(0, ge=0, le=MAX_PROMPT)
    """How many of the first tags keep their places when captions are shuffled."""
    keep_tokens_separator: str | None = Field(None, min_length=1, max_length=20)
    """What ends the tags that keep their places, such as |||; a second one begins those at the end."""
    caption_dropout_rate: float = Field(0.0, ge=0, lt=1)
    """Share of uses at which a caption is left out: only the token is left of it, or nothing with gating = 'none'."""
    repeats: int = Field(1, ge=1, le=MAX_REPEATS)
    """How often each picture is used per epoch, times N in folders called N_name."""
    resolution: int | None = Field(None, ge=1, le=MAX_RESOLUTION)
    """Side of the square training pictures, in pixels. Default: the base's own."""
    enable_bucket: bool = False
    """Cut each picture to the nearest of several sizes of one area, wide and high ones; a batch has one size."""
    min_bucket_reso: int | None = Field(None, ge=1, le=MAX_RESOLUTION)
    """Shortest side of a bucket, in pixels. Default: half the resolution."""
    max_bucket_reso: int | None = Field(None, ge=1, le=2 * MAX_RESOLUTION)
    """Longest side of a bucket, in pixels. Default: twice the resolution."""
    bucket_reso_steps: int | None = Field(None, ge=1, le=MAX_RESOLUTION)
    """Sides of buckets are multiples of it. Default: 64, or less where the resolution is below 512."""
    clip_skip: int | None = Field(None, ge=0, le=32)
    """Layers left out at the end of the text encoder; 1 is kohya's 2. Default: as the base's pictures are drawn."""
    center_crop: bool = True
    """Crop the middle of each picture; if false, a random part each time."""
    random_flip: bool = False
    """Mirror half of the pictures. Not for faces, letters or logos."""
    use_masks: bool = True
    """Use masks where there are any: masks/name.png, white where the concept is."""
    unmasked_weight: float = Field(0.1, ge=0, le=1)
    """Weight of the loss outside a mask; inside it is 1. At 0 nothing restrains backgrounds."""

    adapter_type: str = "additive"
    """A row of fusion.ADAPTERS, such as additive, guarded, rotational or lora."""
    rank: int = Field(8, ge=1, le=65_536)
    """Singular directions the concept owns in each layer."""
    slice: int | None = Field(None, ge=0, le=65_536)
    """Which slice of the spectrum, 0 the strongest. Default: the library's next free one."""
    exclusive_slice: bool = False
    """Refuse to train where no slice is free, instead of sharing the least shared one with other gated concepts."""
    layout: Literal["contiguous", "strided"] = "contiguous"
    """Slices of neighbouring directions, as in the paper, or strided ones, all of about equal energy."""
    slots: int = Field(8, ge=1, le=65_536)
    """Number of slices of a strided layout."""
    targets: list[str] | None = None
    """Layers to adapt, such as unet.attn2.to_k or text_encoder. Default: what suits the gating."""
    gating: Literal["tokens", "none"] = "tokens"
    """With tokens the adapter acts at its own token only, so that concepts do not disturb each other."""
    guard: int = Field(64, ge=0, le=65_536)
    """Guarded type: how many leading directions it does not change, for other concepts."""
    balance_slices: bool = False
    """Raise the learning rate of slices of small singular values, which learn slower."""
    library: Path | None = None
    """Folder of adapters whose slices are taken; the next free one is reserved there. Default: output_dir."""

    optimizer: Literal["adamw", "prodigy", "adafactor", "adamw8bit"] = "adamw"
    """How gradients move the adapter. prodigy finds the learning rate itself (pip install prodigyopt), adafactor keeps
    less in memory, and so does adamw8bit (pip install bitsandbytes)."""
    learning_rate: float = Field(1e-4, gt=0, le=MAX_WEIGHT)
    """Learning rate of the UNet's layers. With prodigy a factor of the rate it finds, 1 if not set, for all parts."""
    text_encoder_lr: float = Field(1e-5, ge=0, le=MAX_WEIGHT)
    """Learning rate of the text encoders' layers; 0 freezes them."""
    token_lr: float = Field(1e-3, ge=0, le=MAX_WEIGHT)
    """Learning rate of the token's embedding; 0 freezes it."""
    lr_scheduler: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = "linear"
    """How learning rates fall; linear reaches zero at the last step."""
    lr_warmup_steps: int = Field(0, ge=0, le=MAX_STEPS)
    """Steps over which learning rates rise from zero."""
    max_train_steps: int = Field(1250, ge=1, le=MAX_STEPS)
    """Optimizer steps in all."""
    train_batch_size: int = Field(2, ge=1, le=MAX_BATCH)
    """Pictures per forward pass."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=10_000)
    """Forward passes per step: larger batches for time instead of memory."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the mean of gradients, for AdamW and prodigy."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay rate of the mean of squared gradients, for AdamW and prodigy."""
    adam_weight_decay: float = Field(1e-2, ge=0, le=MAX_WEIGHT)
    """Weight decay, of every optimizer; not on the token."""
    adam_epsilon: float = Field(1e-8, gt=0, le=1)
    """Epsilon of AdamW and prodigy, against division by zero."""
    max_grad_norm: float = Field(1.0, ge=0, le=MAX_WEIGHT)
    """Gradients are clipped to this norm; 0 does not clip."""
    snr_gamma: float | None = Field(None, gt=0, le=MAX_WEIGHT)
    """Min-SNR weighting (arXiv 2303.09556), usually 5. Default: all timesteps weigh the same."""
    noise_offset: float = Field(0.0, ge=0, le=10)
    """Noise added per channel, for very dark or bright pictures. The paper uses 0.01."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of noise, order and crops: equal seeds give equal adapters."""

    with_prior_preservation: bool = False
    """Also train on the base's own pictures of class_prompt, so that the noun keeps its meaning."""
    class_data_dir: Path | None = None
    """Folder of class pictures; missing ones are drawn into it. Default: a folder in output_dir."""
    class_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    """What class pictures show, without the token, such as "a dog"."""
    num_class_images: int = Field(100, ge=1, le=100_000)
    """Number of class pictures."""
    prior_loss_weight: float = Field(1.0, ge=0, le=MAX_WEIGHT)
    """Weight of class pictures in the loss."""
    sample_batch_size: int = Field(4, ge=1, le=256)
    """Class pictures drawn at a time."""

    quiet_loss_weight: float = Field(0.0, ge=0, le=MAX_WEIGHT)
    """Weight of the quiet loss: ΔW is penalised on prompts without the concept, for exports without gates. Try 10."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the frozen base's arithmetic: auto is that in which it is open, by default bf16 on a GPU that has
    it, else fp16, and no on a CPU. The adapter itself trains in float32."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them, to save memory."""
    cuda_graphs: bool = True
    """On a CUDA GPU, capture a step's kernels once and repeat them: many times faster where batches are small."""
    deterministic: bool = False
    """On a GPU, use kernels only that add in one order, so that equal seeds give equal bits; slower. CPUs always do."""
    cache_latents: bool = True
    """Encode each picture once, before training; not done with random crops or flips."""

    validation_prompt: Prompt | Annotated[list[Prompt], Field(max_length=64)] | None = None
    """Prompts of previews, such as "a {token} on a beach". Default: one picture, of the finished adapter."""
    num_validation_images: int = Field(4, ge=0, le=256)
    """Previews per prompt; with 0 the finished adapter gets no picture either."""
    validation_steps: int = Field(250, ge=1, le=MAX_STEPS)
    """Steps from one set of previews to the next."""

    output_dir: Path = Path("out")
    """Folder for the adapter, checkpoints, previews and logs."""
    output_name: str | None = Field(None, pattern=f"^{NAME}$")
    """Name of the adapter and its file. Default: the token without brackets."""
    save_precision: Literal["float16", "float32"] = "float16"
    """Precision of the adapter's file. float16 takes half the space and draws the same."""
    checkpointing_steps: int = Field(500, ge=0, le=MAX_STEPS)
    """Steps from one checkpoint to the next; 0 writes none."""
    checkpoints_total_limit: int | None = Field(None, ge=1, le=MAX_STEPS)
    """How many checkpoints to keep, the newest. Default: all."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to continue from, or "latest"."""
    report_to: Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "swanlab"] | None = None
    """Where to log loss and learning rate. Default: nowhere."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if problems := list(self._contradictions()):
            raise ConfigError(listing(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        prior, slots = self.with_prior_preservation, self.slots
        if not TOKEN.fullmatch(self.token):
            yield f"token '{self.token}' needs angle brackets around a-z, 0-9, - and _ only, like <dog>."
        if self.gating == "tokens" and self.token not in self.with_token(self.instance_prompt):
            yield f"instance_prompt '{self.instance_prompt}' lacks {{token}}; write it where the concept stands."
        if prior and not self.class_prompt:
            yield "with_prior_preservation needs a class_prompt, such as 'a dog'."
        if not prior and (self.class_prompt or self.class_data_dir):
            yield "class_prompt and class_data_dir do nothing without with_prior_preservation = true."
        if self.token in self.with_token(self.class_prompt or ""):
            yield f"class_prompt must not name {self.token}: class pictures show what is not the concept."
        if self.lr_warmup_steps > self.max_train_steps:
            yield f"lr_warmup_steps {self.lr_warmup_steps} is beyond max_train_steps {self.max_train_steps}."
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            yield "lr_scheduler 'constant' has no warm-up; choose 'constant_with_warmup', or no lr_warmup_steps."
        if self.layout == "strided" and (self.slice or 0) >= slots:
            yield f"slice {self.slice} does not exist among {slots} strided slots; the last is {slots - 1}."
        if self.resume_from_checkpoint == "latest" and not self.checkpointing_steps:
            yield "resume_from_checkpoint = 'latest' needs checkpointing_steps; set it, or name a checkpoint."
        if self.optimizer == "prodigy" and len({rate for rate in self._set_rates().values() if rate}) > 1:
            rates = " and ".join(f"{name} = {rate:g}" for name, rate in self._set_rates().items())
            yield f"optimizer 'prodigy' finds one learning rate for all; {rates} must be equal, best 1, or 0."
        if self.optimizer == "prodigy" and self.balance_slices:
            yield "balance_slices needs a learning rate for each layer, and optimizer 'prodigy' has one for all."
        if self.targets == []:
            yield "targets is empty; name a layer, or leave it out."

    @classmethod
    def from_toml(cls, path: str | Path, over: Mapping[str, Any] | None = None) -> Self:
        """The settings in a file, those in `over` taking precedence. Raises ConfigError.

        Relative paths in the file are relative to it; those in `over` should be absolute.
        """
        return read_toml(path, cls, over)

    def to_toml(self) -> str:
        """TOML that reads back as these settings."""
        return to_toml(self)

    def with_base_defaults(self, table: Mapping[str, Any]) -> Self:
        """As of every model. Learning rates in a base's table are AdamW's: prodigy's are 1, or as the user has set."""
        if self.optimizer == "prodigy":
            table = {name: value for name, value in table.items() if name not in RATES}
        config = super().with_base_defaults(table)
        if config.optimizer != "prodigy":
            return config
        rates = config._set_rates()
        return config.updated(dict.fromkeys(RATES, max(rates.values(), default=0.0) or 1.0) | rates)

    def _set_rates(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in RATES if name in self.model_fields_set}

    @property
    def name(self) -> str:
        """Of the adapter and its file."""
        return self.output_name or self.token.strip("<>")

    def with_token(self, text: str) -> str:
        """A prompt with every placeholder, or the trigger word, replaced by the token."""
        return with_token(text, self.token, self.trigger_word)

    def validation_prompts(self) -> tuple[str, ...]:
        """The prompts of previews, with the token in place."""
        prompts = self.validation_prompt or []
        return tuple(self.with_token(text) for text in ([prompts] if isinstance(prompts, str) else prompts))

    def class_folder(self) -> Path:
        """Where class pictures are: a folder for each class prompt, shared by concepts of one noun."""
        words = re.sub(r"\W+", "-", (self.class_prompt or "").lower()).strip("-")
        return self.class_data_dir or self.output_dir / "class_images" / words

    def varies_captions(self) -> bool:
        """Whether a picture's caption is another one at each use."""
        return self.shuffle_caption or self.caption_dropout_rate > 0

    def uses_class_pictures(self) -> bool:
        """Whether class pictures change anything: under token gating, class prompts run the base itself."""
        return self.with_prior_preservation and self.gating == "none"

    def caches_latents(self) -> bool:
        """Whether every picture is the same each time it is used, and may be encoded once."""
        return self.cache_latents and self.center_crop and not self.random_flip

    def lasting_settings(self) -> dict[str, object]:
        """What shapes the adapter, as JSON values: it is in the adapter's file, and guards resuming."""
        return self.model_dump(mode="json", exclude=MAY_CHANGE)
