"""The optimizer and the loop of pocket's training."""

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from tools.pocket.half import save_half
from tools.pocket.muon import Muon, optimizers, orthogonalise
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
        x = torch.randn(8, 16, generator=draws.torch) * draws.python.random()
        return (model(x) - x).square().mean(), {}

    plan = Plan(steps=20, rate=1e-2, warmup=3, checkpoint_every=5)

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
    rates = [plan.rate_at(step) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] == rates[50] == 1.0
    assert rates[99] < rates[75] == 0.5


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
