"""Distillation: a plain LoRA learns what gated adapters do, whatever their order, and touches nothing else."""

import contextlib

import pytest
import torch

import fusion
import tiny
from fusion.config import read_base_defaults
from fusion.distillation import loop, objective
from fusion.distillation.least_squares import LeastSquares
from fusion.distillation.objective import Objective
from fusion.distillation.pool import PromptPools
from fusion.distillation.prompt_distribution import PromptDistribution
from fusion.distillation.student import Student
from fusion.distillation.teacher import Answers, Teacher
from fusion.errors import BaseMismatch, ConfigError, FormatError, GatingError, TokenConflict
from fusion.methods.distill import (
    distillation_loss,
    gated_change,
    layer_errors,
    least_squares_delta,
    prompt_scales,
    ridge_factor,
)
from fusion.models import float32_layers
from fusion.models.denoising import encode_prompts
from fusion.models.layer_sites import components, sites
from fusion.models.model_state import attached_state
from fusion.spectral.delta import Delta
from trained import attached, draw, everywhere, trained_adapter


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """Fewer prompts to measure on than in earnest."""
    monkeypatch.setattr(loop, "HELD_OUT", 12)
    monkeypatch.setattr(loop, "SCALE_PROMPTS", 4)


def config(tmp_path, **settings):
    usual = {"rank": 16, "max_train_steps": 40, "train_batch_size": 12, "num_prompts": 120, "decoys": 4}
    usual |= {"free_weight": 3.0, "free_share": 0.35}  # so few steps learn little else
    usual |= {"learning_rate": 1e-2, "checkpointing_steps": 0, "output_dir": tmp_path}
    return fusion.DistillationConfig.from_values({**usual, **settings})


def two(pipe, scale=0.2):
    return [trained_adapter(pipe, "<rex>", scale=scale, vectors=2), trained_adapter(pipe, "<tom>", k=1, scale=scale)]


def last(steps):
    return list(steps)[-1]


def tensors(adapter):
    layers = {f"{name}.{k}": t for name, layer in adapter.layers.items() for k, t in layer.state_dict().items()}
    return layers | {f"{token}.{c}": row for token, rows in adapter.tokens.items() for c, row in rows.items()}


def same(one, two):
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def keys_and_values(pipe, prompts):
    """What the UNet is given, and what its projections make of it."""
    with torch.no_grad():
        encoded = encode_prompts(pipe, prompts)
        if (state := attached_state(pipe)) is not None:
            state.start_unet(encoded.states)
        layers = [site.module for name, site in sites(pipe).items() if name.endswith(("attn2.to_k", "attn2.to_v"))]
        return [layer(encoded.states) for layer in layers]


def test_the_loss_is_that_of_whole_keys_computed_naively():
    base, up, down = torch.randn(7, 5), torch.randn(7, 2), torch.randn(2, 5)
    gates, student, teacher = torch.randn(7, 5), torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    rows = torch.tensor([1, 6])
    wanted = teacher @ base.T
    wanted.view(12, 7)[rows] += teacher.view(12, 5)[rows] @ gates.T
    expected = (student @ (base + up @ down).T - wanted).square().mean(dim=(1, 2))
    halves = Delta(torch.cat([gates / 4, gates * 3 / 4], 1), torch.eye(5).repeat(2, 1))
    owners = torch.tensor([0] * 5 + [1] * 5)
    gated = gated_change(halves, owners, teacher.view(12, 5)[rows], torch.ones(2, 2))
    torch.testing.assert_close(layer_errors(base, Delta(up, down), student, teacher, rows, gated), expected)
    scales = prompt_scales(torch.tensor([[2.0], [4.0], [12.0]]), torch.tensor([[1.0, 1, 0], [0, 0, 1], [0, 0, 0]]))
    assert scales.flatten().tolist() == [3, 12, 4]  # the mean of the prompt's concepts, the median without any
    assert prompt_scales(torch.tensor([[6.0]]), torch.zeros(1, 1), free_weight=3).tolist() == [[2]]
    assert float(distillation_loss([torch.tensor([3.0, 6, 4])], scales)) == pytest.approx((1 + 0.5 + 1) / 3)


def test_the_start_is_the_least_squares_answer_of_each_layer():
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(200, 6, generator=generator).double(), torch.rand(200, generator=generator).double()
    x[:, 1:] += 3 * x[:, :1]  # inputs that are much alike
    up, down = (torch.randn(*size, generator=generator).double() for size in ((5, 4), (4, 6)))
    acts = (torch.rand(200, 4, generator=generator) < 0.3).double()
    target, root = ((x @ down.T) * acts) @ up.T, weights.sqrt()[:, None]
    cross, second = (x * weights[:, None]).T @ ((x @ down.T) * acts), (x * weights[:, None]).T @ x

    def error(matrix):
        return float(((x @ matrix.T - target) * root).square().sum())

    whole = least_squares_delta(up, cross, ridge_factor(second), 6).dense().double()
    best = torch.linalg.lstsq(x * root, target * root).solution.T
    assert error(whole) == pytest.approx(error(best), rel=1e-2)  # but for the ridge
    ranked = least_squares_delta(up, cross, ridge_factor(second), 2)
    assert ranked.rank == 2 and error(whole) < error(ranked.dense().double()) < error(torch.zeros(5, 6).double())
    for _ in range(20):
        other = ranked.dense().double() + 0.01 * torch.randn(5, 6, generator=generator).double()
        left, values, right = torch.linalg.svd(other)
        near = (left[:, :2] * values[:2]) @ right[:2]
        assert error(near) >= error(ranked.dense().double()) * (1 - 1e-3)


def test_a_start_is_used_where_it_lowers_the_loss(tmp_path, monkeypatch):
    pipe, losses, solve = tiny.pipeline("sd1"), [], LeastSquares.solve
    adapters = two(pipe)
    for after in (0.9, 1.0):  # what the loss of held-out prompts is said to be with the start; 1 without
        values = iter([1.0, after])
        monkeypatch.setattr(
            LeastSquares, "solve", lambda start, _, report, v=values: solve(start, lambda: next(v), report)
        )
        with contextlib.closing(fusion.distill(pipe, adapters, config(tmp_path))) as steps:
            losses.append(next(steps).loss)
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradients_in_parts_of_a_batch_are_those_of_the_batch(family, tmp_path, monkeypatch):
    """A batch that would take too much memory is computed in parts: the same loss and gradients, within rounding."""
    pipe, counts, results = tiny.pipeline(family), [], []
    adapters, split, add = two(pipe), Answers.split, Objective.add_gradients

    def watched(self, answers):
        loss = add(self, answers)
        gradients = {name: p.grad.clone() for name, p in self.student.parameters().items() if p.grad is not None}
        results.append((loss, gradients))
        return loss

    monkeypatch.setattr(Answers, "split", lambda self, count: counts.append(count) or split(self, count))
    monkeypatch.setattr(Objective, "add_gradients", watched)
    for size in (2**30, 2**20):
        monkeypatch.setattr(objective, "PART_BYTES", size)
        with contextlib.closing(fusion.distill(pipe, adapters, config(tmp_path, max_grad_norm=0))) as steps:
            next(steps)
    (loss, whole), (sum_of_parts, parts) = results
    assert counts[0] == 1 < counts[1] and sum_of_parts == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.long)])
@pytest.mark.parametrize("native", [True, False])
def test_a_base_in_half_precision_is_learned_from_in_the_precision_that_is_fast(family, native, tmp_path, monkeypatch):
    """In bfloat16 where the CPU has instructions for it, else in float32: the same loss, within bfloat16's rounding."""
    monkeypatch.setattr(objective, "computes_in", lambda _: native)
    monkeypatch.setattr(float32_layers, "computes_in", lambda dtype: native or dtype == torch.float32)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = tiny.pipeline(family)
        adapters = two(pipe)
        pipe.to(dtype)
        steps = list(fusion.distill(pipe, adapters, config(tmp_path, max_train_steps=12)))
        losses.append([step.loss for step in steps])
        assert losses[-1][-1] < 0.7 * losses[-1][0]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.2)  # the teacher is rounded, too


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_student_and_teacher_read_prompts_as_the_pipeline_does(family, clip_skip):
    pipe = tiny.pipeline(family)
    adapters, prompts = two(pipe), ["a <rex> and a <tom>", "a dog", "", "<tom> <tom> in the snow", "<tom>, (<rex>)"]
    with attached(pipe, *adapters):
        expected = encode_prompts(pipe, prompts, clip_skip)
    teacher = Teacher(pipe, adapters, trained_adapter(pipe, "<decoy>"), clip_skip)
    with teacher.attached():
        answers = teacher.answer(prompts)
    torch.testing.assert_close(answers.states.float(), expected.states, rtol=1e-2, atol=1e-2)
    assert answers.owners[:, 0].amax(dim=1).tolist() == [1, -1, -1, 1, 1]
    assert teacher.presence(answers.owners).tolist() == [[1, 1], [0, 0], [0, 0], [0, 1], [1, 1]]
    bare = [fusion.fuse([adapter], [0.0]) for adapter in adapters]
    with attached(pipe, *bare):
        base = encode_prompts(pipe, prompts, clip_skip)
    rows = {c: torch.cat([adapter.tokens[t][c] for adapter, t in zip(adapters, ("<rex>", "<tom>"), strict=True)])
            for c in adapters[0].tokens["<rex>"]}  # fmt: skip
    student = Student(
        pipe, rows, {c: row[:0] for c, row in rows.items()}, rank=4, kv_rank=4, seed=0, clip_skip=clip_skip
    )
    encoded = student.encode(answers.ids)
    torch.testing.assert_close(encoded.states, base.states)
    torch.testing.assert_close(encoded.pooled, base.pooled)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_learns_what_the_gated_set_does(family, tmp_path):
    pipe = tiny.pipeline(family)
    adapters, before = two(pipe), draw(pipe, "a photo of a dog")
    final = last(fusion.distill(pipe, adapters, config(tmp_path, max_train_steps=50)))
    result, errors = final.adapter, final.errors
    assert max(errors.one, errors.several, errors.pooled or 0) < 0.7, "of 1 without learning"
    assert errors.drift < 0.2 and (errors.pooled is not None) == (family == "sdxl")
    assert not result.gated and [b.type for b in result.branches] == ["lora"]
    assert [(c.token, c.noun, c.vectors) for c in result.info.concepts] == [("<rex>", "dog", 2), ("<tom>", "dog", 1)]
    stored = fusion.HeldOutErrors.from_json(result.info.provenance.settings["errors"])
    assert stored.one == pytest.approx(errors.one, rel=1e-2)
    # What the file says of held-out prompts is true of a pipeline that the adapter is attached to.
    prompts = ["a <rex>", "a <tom> in the snow", "a photo of a <rex>"]
    with attached(pipe, *adapters):
        wanted = keys_and_values(pipe, prompts)
    with attached(pipe, *(fusion.fuse([adapter], [0.0]) for adapter in adapters)):
        base = keys_and_values(pipe, prompts)
    with attached(pipe, result):
        now = keys_and_values(pipe, prompts)
    ratios = [float((n - w).square().sum() / (b - w).square().sum()) for n, w, b in zip(now, wanted, base, strict=True)]
    assert sum(ratios) / len(ratios) < 2 * errors.one
    # And the pipeline is as it was.
    assert attached_state(pipe) is None and torch.equal(draw(pipe, "a photo of a dog"), before)


def test_neither_the_order_of_adapters_nor_a_second_run_changes_a_bit(tmp_path):
    pipe, settings = tiny.pipeline("sd1"), config(tmp_path, max_train_steps=3)
    adapters = [*two(pipe), trained_adapter(pipe, "<ann>", k=2)]
    digests = [adapter.digest() for adapter in adapters]
    first = last(fusion.distill(pipe, adapters, settings, strengths=[1.0, 0.5, 2.0])).adapter
    for order in ([2, 0, 1], [1, 0, 2]):
        strengths = [(1.0, 0.5, 2.0)[i] for i in order]
        again = last(fusion.distill(tiny.pipeline("sd1"), [adapters[i] for i in order], settings, strengths=strengths))
        assert same(first, again.adapter)
        assert [c.token for c in again.adapter.info.concepts] == [adapters[i].info.concepts[0].token for i in order]
    assert [adapter.digest() for adapter in adapters] == digests, "the inputs are left alone"
    other = last(fusion.distill(pipe, adapters, settings.updated({"seed": 1}), strengths=[1.0, 0.5, 2.0])).adapter
    assert not same(first, other)


def test_fuse_runs_it_to_the_end_and_strength_zero_changes_nothing(tmp_path):
    pipe, settings = tiny.pipeline("sd1"), config(tmp_path, max_train_steps=3)
    fused = fusion.fuse(two(pipe), method="distill", pipe=pipe, rank=5, name="both", distillation=settings)
    assert fused.info.name == "both" and fused.rank == 5 and fused.info.provenance.steps == 3
    silent = fusion.fuse(two(pipe), [0, 0], "distill", pipe=pipe, distillation=settings)
    assert silent.layers and not any(delta.dense().any() for delta in silent.deltas().values())
    assert not any(tmp_path.iterdir())
    for wrong in ({"pipe": None}, {"energy": 0.5}):
        with pytest.raises(ConfigError):
            fusion.fuse(two(pipe), **{"method": "distill", "pipe": pipe, "distillation": settings, **wrong})


def test_closed_midway_the_pipeline_is_as_it_was_also_between_steps(tmp_path):
    pipe = tiny.pipeline("sd1")
    modules = {name: [*component.modules()] for name, component in components(pipe).items()}
    tokenizer, before = pipe.tokenizer, draw(pipe, "a dog beside a cat")
    steps = fusion.distill(pipe, two(pipe), config(tmp_path))
    for _ in range(2):
        next(steps)
        assert attached_state(pipe) is None and torch.equal(draw(pipe, "a dog beside a cat"), before)
    steps.close()
    assert pipe.tokenizer is tokenizer
    assert all([*component.modules()] == modules[name] for name, component in components(pipe).items())


def test_ones_own_prompts_are_read_before_the_first_step_only(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("{token} at sea")
    pipe = tiny.pipeline("sd1")
    steps = fusion.distill(pipe, two(pipe), config(tmp_path, max_train_steps=2, prompts=prompts))
    next(steps)
    prompts.unlink()
    assert last(steps).adapter.info.provenance.settings["phrases"]


def test_resumed_it_ends_where_an_uninterrupted_one_ends(tmp_path):
    pipe = tiny.pipeline("sd1")
    adapters, others = two(pipe), two(pipe, scale=0.1)
    settings = config(tmp_path, max_train_steps=6, checkpointing_steps=4, num_prompts=18, train_batch_size=6)
    whole = last(fusion.distill(pipe, adapters, settings)).adapter  # three groups of prompts, so the second round
    with contextlib.closing(fusion.distill(pipe, adapters, settings)) as steps:
        checkpoint = next(step.checkpoint for step in steps if step.checkpoint)
    for name in ("latest", f"{checkpoint.parent.name}/{checkpoint.name}"):
        resumed = settings.updated({"resume_from_checkpoint": name, "checkpointing_steps": 0, "target_error": 1e-9})
        steps = list(fusion.distill(tiny.pipeline("sd1"), adapters[::-1], resumed))
        assert steps[0].step == 5 and steps[0].resumed == 4
        assert same(whole, steps[-1].adapter)
    for change in ({"rank": 8}, {"seed": 3}, {"use_templates": False}):
        with pytest.raises(ConfigError, match=f"was made with {next(iter(change))} ="):
            next(fusion.distill(pipe, adapters, resumed.updated(change)))
    with pytest.raises(ConfigError, match="was made with adapters ="):
        next(fusion.distill(pipe, others, resumed))
    file = checkpoint / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        next(fusion.distill(pipe, adapters, resumed.updated({"resume_from_checkpoint": str(checkpoint)})))


class Echo:
    """A teacher whose answer to a prompt is its length, and which counts what it is asked."""

    def __init__(self):
        self.count, self.attached = 0, contextlib.nullcontext

    def answer(self, prompts):
        self.count += len(prompts)
        sizes = torch.tensor([[len(prompt)] for prompt in prompts])
        return Answers({"text_encoder": sizes}, sizes[..., None].float(), None, sizes[:, None])


def test_pools_stay_within_their_memory_and_batches_depend_on_the_step_alone(tmp_path):
    settings = config(tmp_path, train_batch_size=4, num_prompts=32, max_train_steps=40, teacher_memory=1)
    distribution = PromptDistribution([fusion.Concept("<rex>", "dog")], ["snow", "photo", "robot"])
    for share, pools in ((1 / 40, 1), (1 / 20, 2), (1 / 9, 4)):  # of the memory, for one prompt
        first, second = (PromptPools(Echo(), distribution, settings, 40, share * 2**20) for _ in range(2))
        assert first.count == pools and first.size * share <= 1
        batches = {step: first.batch(step).states.flatten().tolist() for step in range(1, 41)}
        assert first.teacher.count == 32
        for step in (40, 7, 23):
            assert second.batch(step).states.flatten().tolist() == batches[step]
        size = first.size // 4
        rounds = [[n for s in range(r, r + size) for n in batches[s]] for r in (1, 1 + size)]
        assert sorted(rounds[0]) == sorted(rounds[1]) and rounds[0] != rounds[1]


def test_layers_that_prompts_do_not_feed_are_kept_ungated_and_said_so(tmp_path, caplog):
    pipe = tiny.pipeline("sd1")
    broad = trained_adapter(pipe, "<rex>", targets=everywhere(pipe))
    result = last(fusion.distill(pipe, [broad], config(tmp_path, max_train_steps=2), strengths=[0.5])).adapter
    learned, rest = result.branches
    assert "are kept as they are, without gates" in caplog.text
    assert {*learned.layers, *rest.layers} == {*broad.layer_names} | {*learned.layers}
    assert rest.strength == 0.5 and not rest.gate and rest.type == "additive"
    assert rest.layers["unet.mid_block.attentions.0.proj_in"] is broad.layers["unet.mid_block.attentions.0.proj_in"]
    fusion.save(result, tmp_path / "both.safetensors")
    assert len(fusion.load(tmp_path / "both.safetensors").branches) == 2


def test_what_cannot_be_distilled_is_refused_in_one_line_before_the_work(tmp_path):
    pipe, settings = tiny.pipeline("sd1"), config(tmp_path)
    rex = trained_adapter(pipe, "<rex>")
    style = fusion.Adapter(rex.info.__class__("style", rex.info.base), trained_adapter(pipe, gated=False).branches, {})
    foreign = trained_adapter(tiny.pipeline("sd2"), "<tom>")
    cases = [
        ([], ConfigError, "nothing to distill"),
        ([rex, trained_adapter(pipe, "<rex>", k=1)], TokenConflict, "both use <rex>"),
        ([trained_adapter(pipe, "<tom>", gated=False)], GatingError, "'<tom>' of 'tom' has no gate"),
        ([style], TokenConflict, "'style' has no concept token"),
        ([foreign], BaseMismatch, "sd2"),
        ([rex, foreign], BaseMismatch, "different families"),
        ([trained_adapter(tiny.pipeline("sd1", seed=5), "<tom>")], BaseMismatch, "residual"),
    ]
    for adapters, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            next(fusion.distill(pipe, adapters, settings))
        assert "\n" not in str(caught.value)
    with attached(pipe, rex), pytest.raises(ConfigError, match="detach them first"):
        next(fusion.distill(pipe, [trained_adapter(pipe, "<tom>", k=1)], settings))
    for wrong in ({"rank": 0}, {"free_share": 1.0}, {"output_name": "a/b"}):
        with pytest.raises(ConfigError):
            config(tmp_path, **wrong)
    for text, words in (("\n", "no line with {token}"), (None, "cannot be read")):
        file = tmp_path / "prompts.txt"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            next(fusion.distill(pipe, [rex], settings.updated({"prompts": file})))


def test_the_embedded_base_has_learning_rates_of_its_own():
    table = read_base_defaults(fusion.pocket(), "distillation")
    assert fusion.DistillationConfig().with_base_defaults(table).learning_rate == table["learning_rate"] == 3e-3
    with pytest.raises(ConfigError, match="output_name"):
        fusion.DistillationConfig().with_base_defaults({"output_name": "mine"})
