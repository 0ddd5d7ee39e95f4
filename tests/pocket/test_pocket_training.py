"""The optimizer and the loop of pocket's training."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.pocket import denoiser
from tools.pocket.half import save_half
from tools.pocket.muon import Muon, optimizers, orthogonalise
from tools.pocket.settings import Settings
from tools.pocket.training import Plan, copy_matching, train


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_an_update_is_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalise(matrix).flatten(), (U @ Vh).flatten(), dim=0) > 0.95


def test_muon_takes_the_hidden_weights_and_adam_the_rest():
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.GroupNorm(4, 32), torch.nn.Linear(32, 4))
    muon, adam = optimizers(model, 1e-3)
    assert isinstance(muon, Muon)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(32, 16, 3, 3)]
    assert len(adam.param_groups[0]["params"]) == 5


def toy(folder, steps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))

    def loss_of(model, draws, step):
        x = draws.normal(8, 16) * draws.python.random()
        return (model(x) - x).square().mean(), {}

    plan = Plan(steps=20, rate=1e-2, warmup=3, checkpoint_seconds=0)

    def stopping(model, draws, step):
        if step == steps:
            raise KeyboardInterrupt
        return loss_of(model, draws, step)

    return train(folder, model, plan, stopping)


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # no trials of other numbers of threads
    whole = toy(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "parts", 13)
    again = toy(tmp_path / "parts", 20)
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_rate_rises_stays_and_falls():
    plan = Plan(steps=100, rate=1.0, warmup=10, decay=0.5)
    rates = [plan.rate_at(step, plan.progress(step, 0)) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] == rates[50] == 1.0
    assert rates[99] < rates[75] == 0.5


def test_a_plan_by_minutes_ends_when_they_are_over_and_counts_those_before(tmp_path):
    plan = Plan(steps=10**9, rate=1.0, minutes=2, decay=0.5)
    assert [plan.progress(7, seconds) for seconds in (0, 60, 120)] == [0, 0.5, 1]
    assert plan.rate_at(1000, plan.progress(1000, 90)) == 0.5
    model, steps = torch.nn.Linear(16, 16), []

    def loss_of(model, draws, step):
        steps.append((step, draws.progress))
        return model(draws.normal(4, 16)).square().mean(), {}

    for minutes in (0.005, 0.01, 0.01):
        train(tmp_path, model, Plan(steps=1, rate=1e-2, minutes=minutes), loss_of)
    assert [step for step, _ in steps] == list(range(len(steps)))
    assert [progress for _, progress in steps].count(0) < 5  # the second run went on, the third had nothing to do
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["seconds"] >= 0.6


def test_a_model_that_is_run_in_bfloat16_is_trained_in_float32(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    model[0].bias.requires_grad_(False)
    before, bias, losses = model[0].weight.detach().clone(), model[0].bias.detach().clone(), []

    def loss_of(model, draws, step):
        x = draws.normal(32, 16)
        y = model(x.bfloat16())
        assert {p.dtype for p in model.parameters()} == {y.dtype} == {torch.bfloat16}
        losses.append((y.float() - x).square().mean())
        return losses[-1], {}

    best = train(tmp_path, model, Plan(steps=60, rate=2e-2, warmup=3, average=0.5, dtype=torch.bfloat16), loss_of)
    assert losses[-1] < losses[0] / 2
    assert {p.dtype for p in best.parameters()} == {torch.float32}
    weight = best[0].weight
    assert not torch.equal(weight, weight.bfloat16().float()) and not torch.equal(weight, before)
    assert torch.equal(best[0].bias, bias)


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (64, 16), (16, 16)])
def test_muon_moves_weights_of_one_shape_as_each_alone(shape):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for _ in range(3)]
    alone = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    steps = [Muon(weights, 1e-2, weight_decay=0.1), *(Muon([w], 1e-2, weight_decay=0.1) for w in alone)]
    for _ in range(3):
        for one, other in zip(weights, alone, strict=True):
            one.grad = torch.randn(shape, generator=rng)
            other.grad = one.grad.clone()
        for opt in steps:
            opt.step()
    for one, other in zip(weights, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_shapes_that_are_each_others_transpose_are_moved_as_such():
    w = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    wide, tall = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.T.clone())
    wide.grad, tall.grad = w.flip(0), w.flip(0).T.contiguous()
    Muon([wide, tall], 1e-2).step()
    assert torch.allclose(wide, tall.T, atol=1e-6) and not torch.equal(wide, w)


def test_a_denoiser_with_more_channels_starts_by_predicting_those_of_the_older_one():
    shipped = Path(__file__).parents[2] / "assets" / "pocket"
    tokenizer = CLIPTokenizer.from_pretrained(shipped, subfolder="tokenizer")
    model = denoiser.fresh(tokenizer, Settings(64, 16, 8)).eval()
    denoiser.start_from(model, shipped)
    older = UNet2DConditionModel.from_pretrained(shipped, subfolder="unet").eval()
    x, t, text = torch.randn(2, 8, 4, 4), torch.tensor([50, 900]), torch.randn(2, 64, 192)
    with torch.no_grad():
        ours, theirs = model.unet(x, t, text).sample, older(x[:, :4], t, text).sample
    assert torch.allclose(ours[:, :4], theirs, atol=1e-4) and not ours[:, 4:].any()


def test_a_denoiser_of_larger_latents_has_the_older_one_inside():
    shipped = Path(__file__).parents[2] / "assets" / "pocket"
    tokenizer = CLIPTokenizer.from_pretrained(shipped, subfolder="tokenizer")
    model = denoiser.fresh(tokenizer, Settings(256, 8, 4)).eval()
    denoiser.start_from(model, shipped)
    older = UNet2DConditionModel.from_pretrained(shipped, subfolder="unet").eval()
    x, t, text = torch.randn(2, 4, 32, 32), torch.tensor([50, 900]), torch.randn(2, 64, 192)
    ours, theirs, pairs = model.unet, older, [("down_blocks.1.attentions.0", "down_blocks.0.attentions.0")]
    pairs += [(f"down_blocks.{k + 1}", f"down_blocks.{k}") for k in (1, 2)] + [("mid_block", "mid_block")]
    pairs += [(f"up_blocks.{k}", f"up_blocks.{k}") for k in (0, 1)]
    for one, other in pairs:
        weights = theirs.get_submodule(other).state_dict()
        assert all(torch.equal(weights[name], w) for name, w in ours.get_submodule(one).state_dict().items())
    times = torch.arange(0, 1000, 7)
    with torch.no_grad():
        assert ours(x, t, text).sample.shape == x.shape
        one, other = (unet.time_embedding(unet.time_proj(times)) for unet in (ours, theirs))
    assert (one - other).norm() < 0.05 * other.norm()
    blocks = [type(block).__name__ for block in (*ours.down_blocks, *ours.up_blocks)]
    assert blocks[0] == "DownBlock2D" and blocks[-1] == "UpBlock2D" and len(blocks) == 8


def test_a_start_gives_what_both_have():
    model = torch.nn.Linear(3, 4)
    other = torch.nn.Linear(3, 2)
    kept = model.weight[2:].clone()
    assert copy_matching(model, other.state_dict()) == ["weight", "bias"]
    assert torch.equal(model.weight[:2], other.weight)
    assert torch.equal(model.weight[2:], kept)


def test_half_on_disk_is_float32_at_work(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=4, eos_token_id=39, pad_token_id=39))
    save_half(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    again = CLIPTextModel.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    ids = torch.tensor([[3, 5, 39]])
    assert torch.equal(again(ids)[0], model.float()(ids)[0])
