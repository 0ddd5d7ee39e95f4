"""The settings of a distillation, under the names that a training has for the same."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from fusion.config import MAX_BATCH, MAX_PROMPT, MAX_SEED, MAX_STEPS, MAX_WEIGHT, NAME, StrictModel
from fusion.errors import ConfigError

# What may be another when a distillation is resumed; every other setting shapes the adapter.
MAY_CHANGE = {
    *("prompts", "output_dir", "output_name", "resume_from_checkpoint", "checkpointing_steps"),
    *("checkpoints_total_limit", "target_error"),
}
# What a prompt has to be about where the base's fusion.toml lists nothing.
SUBJECTS = list[str](
    (
        "dog cat bird horse cow sheep pig rabbit mouse bear lion tiger elephant monkey fox wolf fish snake "
        "frog duck owl butterfly spider dragon man woman child boy girl baby king queen knight soldier robot "
        "ghost angel astronaut doctor car bus train boat ship plane bicycle truck rocket house castle church "
        "tower bridge street city room kitchen door window chair table bed lamp clock book phone camera "
        "guitar piano ball hat shoe dress shirt bag cup bottle knife umbrella flower rose tree leaf forest "
        "mountain river beach sea island sky cloud sun moon star snow fire apple banana bread cake pizza egg "
        "face hand eye"
    ).split()
)
PHRASES = ("subjects", "styles")
Phrases = Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=10_000)]


class DistillationConfig(StrictModel):
    """Settings of one distillation. What the user has not set may come from the base's `fusion.toml`."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    names_or_paths = ("resume_from_checkpoint",)
    users_own = ("output_name", "checkpointing_steps", "checkpoints_total_limit")
    groups: ClassVar = {
        "LoRA": "rank",
        "prompts": "prompts",
        "optimisation": "learning_rate",
        "run": "output_dir",
    }

    rank: int = Field(64, ge=1, le=4096)
    """Rank of the LoRA in the text encoders."""
    kv_rank: int | None = Field(None, ge=1, le=4096)
    """Rank of the LoRA in the keys and values of cross-attention. Default: rank."""

    prompts: Path | None = None
    """File of prompts of your own, one a line, learned among the others; {token} stands for each concept in turn."""
    use_templates: bool = True
    """Also learn from sentences; if false, from words of the tokenizer in any order alone."""
    subjects: Phrases = Field(SUBJECTS, min_length=1)
    """What sentences are about beside the concepts; a base's fusion.toml may list what that base knows."""
    styles: Phrases = Field([])
    """Styles that sentences name, as in "a STYLE style SUBJECT"."""
    num_prompts: int = Field(5000, ge=1, le=1_000_000)
    """Different prompts in all; each is used several times."""
    free_share: float = Field(0.45, ge=0, lt=1)
    """Share of prompts without a concept. A tenth of them are empty."""
    free_weight: float = Field(5.0, gt=0, le=MAX_WEIGHT)
    """Weight of a prompt without a concept in the loss; one with concepts has 1."""
    decoys: int | None = Field(None, ge=0, le=1000)
    """Unknown words among the prompts, so that the LoRA leaves other people's concepts alone. Default: 128 for one
    concept, whose file is the more likely to be used beside others, and 32 for several."""
    teacher_memory: int = Field(2048, ge=1, le=2**20)
    """Most memory for the teacher's answers, in MiB. Where they need more, prompts are answered in several parts."""

    learning_rate: float = Field(5e-4, gt=0, le=MAX_WEIGHT)
    """Learning rate of the LoRA; it falls to 2 % of it as a cosine."""
    token_lr: float = Field(2e-4, ge=0, le=MAX_WEIGHT)
    """Learning rate of the concepts' embeddings; 0 leaves them as they are."""
    lr_warmup_steps: int = Field(20, ge=0, le=MAX_STEPS)
    """Steps over which learning rates rise from zero."""
    max_train_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    """Optimizer steps in all. Default: 675, and 35 more for every further concept."""
    train_batch_size: int = Field(32, ge=1, le=MAX_BATCH)
    """Prompts per step."""
    max_grad_norm: float = Field(1.0, ge=0, le=MAX_WEIGHT)
    """Gradients are clipped to this norm; 0 does not clip."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """The result is an average of the weights over the last 1 / (1 - ema_decay) steps."""
    pooled_weight: float = Field(0.1, ge=0, le=MAX_WEIGHT)
    """Weight of SDXL's pooled embedding in the loss, beside the keys and values."""
    clip_skip: int | None = Field(None, ge=1, le=32)
    """Layers of the text encoder to skip, as in diffusers, for pictures that will be drawn so. Default: none."""
    target_error: float | None = Field(None, gt=0, le=MAX_WEIGHT)
    """Stop early once prompts with one concept, and those with several, have at most this error, such as 0.01."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of prompts, order and starting weights: equal seeds give equal adapters on a CPU."""

    output_dir: Path = Path("out")
    """Folder for checkpoints."""
    output_name: str = Field("distilled", pattern=f"^{NAME}$")
    """Name of the adapter, and of the folder of its checkpoints."""
    checkpointing_steps: int = Field(100, ge=0, le=MAX_STEPS)
    """Steps from one checkpoint to the next; 0 writes none."""
    checkpoints_total_limit: int | None = Field(1, ge=1, le=MAX_STEPS)
    """How many checkpoints to keep, the newest."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to continue from, or "latest"."""

    def steps_for(self, concepts: int) -> int:
        """The steps of a distillation of so many concepts."""
        return self.max_train_steps or 640 + 35 * concepts

    def decoys_for(self, concepts: int) -> int:
        """The decoys of a distillation of so many concepts."""
        return (128 if concepts == 1 else 32) if self.decoys is None else self.decoys

    def lasting_settings(self) -> dict[str, Any]:
        """What shapes the adapter, as JSON values: it is in the adapter's file, and guards resuming."""
        return self.model_dump(mode="json", exclude={*MAY_CHANGE, *PHRASES}) | {"phrases": self._phrases_digest()}

    def _phrases_digest(self) -> str:
        """A hash of the phrases and of the user's own prompts, which are too long for a file's metadata."""
        phrases = [*(getattr(self, name) for name in PHRASES), self.prompt_lines()]
        return hashlib.sha256(json.dumps(phrases).encode()).hexdigest()[:16]

    def prompt_lines(self) -> list[str]:
        """The prompts of the file, with {token} where a concept goes. Raises ConfigError for a file without any."""
        if self.prompts is None:
            return []
        try:
            lines = self.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"prompts: '{self.prompts}' cannot be read as text: {reason}.") from None
        prompts = [line.strip().replace("[trigger]", "{token}") for line in lines if line.strip()]
        if not any("{token}" in prompt for prompt in prompts):
            raise ConfigError(f"prompts: '{self.prompts}' has no line with {{token}}; write it where a concept stands.")
        if (longest := max(map(len, prompts))) > MAX_PROMPT:
            raise ConfigError(f"prompts: '{self.prompts}' has {longest} letters in a line; the limit is {MAX_PROMPT}.")
        return prompts

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints of all runs of this output name are."""
        return self.output_dir / "checkpoints" / self.output_name
