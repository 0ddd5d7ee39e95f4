"""distill(): gated adapters become one plain LoRA with embeddings, as a generator of steps.

Close the generator to stop. The pipeline is used only while the teacher answers prompts, inside a step; between steps,
and afterwards, it is as it was.
"""

import math
import random
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Provenance, checked_strengths
from fusion.distillation.config import DistillationConfig
from fusion.distillation.decoys import decoys_for
from fusion.distillation.held_out_errors import HeldOutErrors
from fusion.distillation.least_squares import LeastSquares
from fusion.distillation.objective import Objective
from fusion.distillation.pool import PromptPools
from fusion.distillation.prompt_distribution import PromptDistribution, decoy_share, words_of
from fusion.distillation.requirements import check_distillable, own_captions, unfed_branches
from fusion.distillation.student import Student, concept_rows
from fusion.distillation.teacher import Answers, Teacher
from fusion.errors import ConfigError, FusionError
from fusion.formats.checkpoint_file import Checkpoint, RunCheckpoints, find_checkpoint, prepare_folder, read_checkpoint
from fusion.layer_names import TOKENIZERS
from fusion.models.model_state import attached_state
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_defaults, base_info
from fusion.models.tokens import text_encoders
from fusion.progress import OnPhase

SCALE_PROMPTS = 16  # for each concept, to measure how much it changes keys and values
START_PROMPTS = 512  # from which the start is solved
HELD_OUT = 64  # prompts of each kind: with one concept, with several, with none
TARGET_STEPS = 50  # steps from one comparison with target_error to the next
WHOLE_STEPS = 6  # every so many steps see all positions; what pads prompts is much alike, so others see one of it
LEAST_RATE = 0.02  # what is left of the learning rate at the end


@dataclass(frozen=True)
class DistillationStep:
    """What one optimizer step did. The last one has the finished adapter and its errors."""

    step: int  # 1 … total
    total: int
    loss: float
    learning_rate: float
    seconds: float  # since the distillation began
    adapter: Adapter | None = None  # at the last step
    errors: HeldOutErrors | None = None  # at the last step, and where they are compared with target_error
    checkpoint: Path | None = None  # written at this step
    resumed: int = 0  # steps that were done before, by the checkpoint this distillation was resumed from
    run: str = ""  # the id of the run, which is the folder of its checkpoints


def distill(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    config: DistillationConfig | None = None,
    *,
    strengths: Sequence[float] | None = None,
    on_progress: OnPhase | None = None,
) -> Generator[DistillationStep]:
    """Learn one ungated adapter of type lora that does what the gated `adapters` do together at their `strengths`.

    It can be exported as it is, and leaves prompts without its concepts alone without any gate. Settings left open come
    from the base's `fusion.toml`. Everything is checked before the first step. Raises BaseMismatch, TokenConflict,
    GatingError for adapters without gates, ConfigError, FormatError for a damaged checkpoint; FusionError when the loss
    is not finite. `on_progress(phase, done, total)` counts the prompts that the teacher answers before the first step.
    An error, Ctrl+C or a KeyboardInterrupt thrown into the generator end it after a checkpoint of its
    last whole step.
    """
    values = checked_strengths(adapters, strengths)
    check_distillable(pipe, adapters)
    if attached_state(pipe) is not None:
        raise ConfigError("This pipeline has adapters attached, which a teacher would include; detach them first.")
    settings = (config or DistillationConfig.model_validate({})).with_base_defaults(base_defaults(pipe, "distillation"))
    steps = settings.steps_for(sum(len(adapter.info.concepts) for adapter in adapters))
    distillation = _Distillation(pipe, adapters, values, settings, steps, on_progress or (lambda *_: None))
    yield from distillation.steps()


class _Distillation:
    """One distillation: what its steps read and change."""

    def __init__(
        self, pipe: Pipeline, adapters: Sequence[Adapter], strengths: Sequence[float], config: DistillationConfig,
        steps: int, on_progress: OnPhase,
    ) -> None:  # fmt: skip
        self.pipe, self.config, self.adapters, self.strengths = pipe, config, adapters, strengths
        self.on_progress = on_progress
        # In the order of their tokens, so that the order in which they are given does not matter.
        scaled = [_scaled(adapter, strength) for adapter, strength in zip(adapters, strengths, strict=True)]
        ordered = sorted(scaled, key=lambda adapter: [concept.token for concept in adapter.info.concepts])
        self.total = steps
        self.learns = any(branch.strength for adapter in ordered for branch in adapter.branches)
        self.base, self.lasting = base_info(pipe), config.lasting_settings()
        # Everything that shapes the result, in JSON values: a distillation is resumed under the same only.
        self.settings: dict[str, Any] = {
            **self.base.lasting_settings(), "adapters": [adapter.digest()[:16] for adapter in ordered], **self.lasting
        }  # fmt: skip
        if config.checkpointing_steps:
            prepare_folder(config.checkpoint_folder, steps)
        name, checkpoint = config.resume_from_checkpoint, None
        if name:
            checkpoint = find_checkpoint(name, config.checkpoint_folder, lambda p: read_checkpoint(p, self.settings))
        self.run = (checkpoint and checkpoint.state.run) or secrets.token_hex(4)
        self.resumed = checkpoint.state.step if checkpoint else 0
        self.done = self.resumed  # the step whose state the parameters have
        self.checkpoints = RunCheckpoints(
            config.checkpoint_folder / self.run, config.checkpointing_steps, config.checkpoints_total_limit, self.done
        )
        self.last_loss = checkpoint.state.loss if checkpoint else math.nan

        decoys = config.decoys_for(sum(len(adapter.info.concepts) for adapter in ordered))
        self.teacher = Teacher(pipe, ordered, decoys_for(pipe, ordered, decoys, config.seed), config.clip_skip)
        self.student = Student(
            pipe, concept_rows(pipe, ordered), concept_rows(pipe, [self.teacher.decoys]), rank=config.rank,
            kv_rank=config.kv_rank or config.rank, seed=config.seed, clip_skip=config.clip_skip,
        )  # fmt: skip
        self.objective = Objective(self.teacher, self.student, config)
        self.distribution = PromptDistribution(
            self.teacher.concepts,
            words_of(getattr(pipe, TOKENIZERS[next(iter(text_encoders(pipe)))])),
            [concept.token for concept in self.teacher.decoys.info.concepts],
            [*own_captions(ordered), *config.prompt_lines()],
            config.subjects,
            config.styles,
            config.use_templates,
            config.free_share,
            decoy_share(len(self.teacher.concepts)),
        )
        self._measure_teacher(on_progress)
        self.pools = PromptPools(self.teacher, self.distribution, config, steps, self.tests[-1][0].size / HELD_OUT)
        if checkpoint is None and self.learns:
            start = LeastSquares(self.teacher, self.student, config.free_weight)
            self.pools.answer_first(START_PROMPTS, start.answer, partial(on_progress, "answering prompts for a start"))
            start.solve(self._start_loss, partial(on_progress, "solving for a start"))
        self._start(checkpoint)

    def _start(self, checkpoint: Checkpoint | None) -> None:
        """The optimizer and the averages, fresh or from a checkpoint."""
        config, named = self.config, self.student.parameters()
        rows = [named[name] for name in named if name.endswith(".rows")]
        loras = [named[name] for name in named if not name.endswith(".rows")]
        groups: list[dict[str, Any]] = [{"params": loras, "lr": config.learning_rate}]
        if config.token_lr:
            groups.append({"params": rows, "lr": config.token_lr})
        self.rates: list[float] = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.trained = [p for group in groups for p in group["params"]]
        self.averages = {name: parameter.detach().clone() for name, parameter in named.items()}
        if checkpoint:
            checkpoint.restore(self._stored(), self.optimizer, None)

    def _stored(self) -> dict[str, Any]:
        """What a checkpoint holds: parameters, and their averages."""
        return {**self.student.parameters(), **{f"average.{name}": mean for name, mean in self.averages.items()}}

    def _measure_teacher(self, on_progress: OnPhase) -> None:
        """How much each concept changes keys and values, and the held-out prompts, with an untrained student."""
        rng = random.Random(f"{self.config.seed} held out")
        with self.teacher.attached(), torch.no_grad():
            scales = list[Tensor]()
            for number, concept in enumerate(self.teacher.concepts):
                on_progress("measuring the concepts", number, len(self.teacher.concepts))
                prompts = replace(self.distribution, concepts=[concept]).draw(rng, SCALE_PROMPTS, (1, 1))
                errors, pooled = self.objective.errors(self.teacher.answer(prompts))
                scales.append(torch.stack([e.mean() for e in (*errors, *([] if pooled is None else [pooled]))]))
            self.objective.scales = torch.stack(scales)
            kinds = [(1, 1), (2, 3), (0, 0)] if len(self.teacher.concepts) > 1 else [(1, 1), (0, 0)]
            self.tests = list[tuple[Answers, list[Tensor], Tensor | None]]()
            for number, limits in enumerate(kinds):
                on_progress("answering held-out prompts", number, len(kinds))
                answers = self.teacher.answer(self.distribution.draw(rng, HELD_OUT, limits))
                errors, pooled = self.objective.errors(answers)
                whole = self._base_squares(answers) if limits == (0, 0) else [error.sum() for error in errors]
                self.tests.append((answers, whole, None if pooled is None else pooled.sum()))

    def _start_loss(self) -> float:
        """The loss of some held-out prompts of each kind, as they weigh in learning."""
        some = slice(SCALE_PROMPTS)
        with torch.no_grad():
            return sum(self.objective.loss(answers.select(some)).item() for answers, *_ in self.tests)

    def _base_squares(self, answers: Answers) -> list[Tensor]:
        """The sums over prompts of the mean squares of the base's keys and values."""
        states = answers.states.float()
        return [(states @ w.float().T).square().mean(dim=(1, 2)).sum() for w in self.student.weights.values()]

    def steps(self) -> Generator[DistillationStep]:
        self.began = time.monotonic()
        total = self.total if self.learns else 0
        try:
            for number in range(self.resumed + 1, total + 1) or [self.resumed]:
                step = self._step(number, total)
                yield step
                if step.adapter is not None:
                    return
        except (Exception, KeyboardInterrupt):
            self._save_checkpoint()
            raise

    def _step(self, step: int, total: int) -> DistillationStep:
        config = self.config
        if step > self.resumed:
            self.last_loss = self._optimize(step)
            self.done = step
        compare = config.target_error is not None and step % TARGET_STEPS == 0
        errors = self._held_out() if compare or step == total else None
        reached = errors is not None and config.target_error is not None and errors.within(config.target_error)
        checkpoint = self._save_checkpoint() if self.checkpoints.due(step) else None
        adapter = self._adapter(step, errors) if errors and (reached or step == total) else None
        rate, took = self._rate(step) * config.learning_rate, time.monotonic() - self.began
        return DistillationStep(
            step, total, self.last_loss, rate, took, adapter, errors, checkpoint, self.resumed, self.run
        )

    def _rate(self, step: int) -> float:
        """The factor of the learning rates: warm-up, then a cosine."""
        warm = min(1.0, step / max(1, self.config.lr_warmup_steps))
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / self.total)
        return warm * (LEAST_RATE + (1 - LEAST_RATE) * cosine)

    def _optimize(self, step: int) -> float:
        """One optimizer step; returns the loss."""
        answers = self.pools.batch(step)
        if step % WHOLE_STEPS:
            answers = answers.cut(self.teacher.length(answers.ids))
        self.optimizer.zero_grad(set_to_none=True)
        value = self.objective.add_gradients(answers)
        if not math.isfinite(value):
            raise FusionError(
                f"The loss is {value} at step {step}; the learning rate ({self.config.learning_rate:g}) is probably "
                "too high for this base. The last checkpoint, if any, is untouched."
            )
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._rate(step)
        self.optimizer.step()
        with torch.no_grad():
            share = 1 - min(self.config.ema_decay, step / (9 + step))
            for name, parameter in self.student.parameters().items():
                self.averages[name].lerp_(parameter, share)
        return value

    @contextmanager
    def _averaged(self) -> Generator[None]:
        """With the averages as the student's parameters."""
        named = self.student.parameters()
        current = {name: parameter.detach().clone() for name, parameter in named.items()}
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(self.averages[name])
            try:
                yield
            finally:
                for name, parameter in named.items():
                    parameter.copy_(current[name])

    def _held_out(self) -> HeldOutErrors:
        """The errors of the averaged weights."""
        if not self.learns:
            return HeldOutErrors(0.0, None, 0.0)
        ratios, shares = list[float](), list[float]()
        with self._averaged():
            for number, (answers, whole, pooled_whole) in enumerate(self.tests):
                self.on_progress("measuring held-out prompts", number, len(self.tests))
                errors, pooled = self.objective.errors(answers)
                ratios.append(_mean_ratio([error.sum() for error in errors], whole))
                if pooled is not None and pooled_whole is not None:
                    shares.append(_mean_ratio([pooled.sum()], [pooled_whole]))
        return HeldOutErrors(ratios[0], ratios[1] if len(ratios) > 2 else None, ratios[-1], next(iter(shares), None))

    def _save_checkpoint(self) -> Path | None:
        """A checkpoint of the last whole step, unless there is one."""
        return self.checkpoints.save(
            self._stored(), self.optimizer, None, step=self.done, loss=self.last_loss, settings=self.settings
        )

    def _adapter(self, step: int, errors: HeldOutErrors) -> Adapter:
        """The averages as an adapter, beside the branches that prompts do not feed."""
        concepts = tuple(concept for adapter in self.adapters for concept in adapter.info.concepts)
        layers = {
            name: type(lora)(self.averages[f"{name}.up"].clone(), self.averages[f"{name}.down"].clone())
            for name, lora in self.student.loras.items()
            if self.averages[f"{name}.up"].any() or not self.learns
        }
        tokens, start = dict[str, dict[str, Tensor]](), 0
        for concept in self.teacher.concepts:
            part = slice(start, start := start + concept.vectors)
            rows = {component: self.averages[f"{component}.rows"] for component in self.student.rows}
            tokens[concept.token] = {component: row[part].clone() for component, row in rows.items()}
        name = self.config.output_name
        names = [adapter.info.name for adapter in self.adapters]
        settings = {"method": "distill", "strengths": list(self.strengths), "errors": errors.to_json()}
        provenance = Provenance(
            "distill", step, self.config.seed, tuple(f"{a.info.name} {a.digest()[:12]}" for a in self.adapters),
            {**settings, **self.lasting}, self.run,
        )  # fmt: skip
        info = AdapterInfo(name, self.base, concepts, provenance)
        branches = (Branch("+".join(names), "lora", layers), *unfed_branches(self.adapters, self.strengths))
        return Adapter(info, branches, {concept.token: tokens[concept.token] for concept in concepts})


def _scaled(adapter: Adapter, strength: float) -> Adapter:
    branches = tuple(replace(branch, strength=branch.strength * strength) for branch in adapter.branches)
    return replace(adapter, branches=branches, digest_cache=None)


def _mean_ratio(errors: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    return float(torch.stack([e / w.clamp(min=1e-30) for e, w in zip(errors, whole, strict=True)]).mean())
