"""`fuse --method distill`, `export --distill` and `inspect` of what they write; interrupted, and resumed."""

import json
import shlex

import pytest
import torch
from safetensors import safe_open

import fusion
import tiny
from fusion.cli import main
from fusion.distillation import loop
from fusion.evaluation import output_error
from trained import trained_adapter

QUICK = ["--num_prompts", "24", "--train_batch_size", "6", "--decoys", "2", "--rank", "4", "--max_train_steps", "4"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A toy base and two adapters for it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "HELD_OUT", 8)
    monkeypatch.setattr(loop, "SCALE_PROMPTS", 2)
    pipe = tiny.pipeline("sd1")
    pipe.save_pretrained("base")
    pipe = fusion.open_pipeline("base")
    for k, token in enumerate(("<rex>", "<tom>")):
        fusion.save(trained_adapter(pipe, token, k=k, scale=0.2), f"{token[1:-1]}.safetensors")
    return tmp_path


def noisy(pipe, _adapters, prompts, _seed, _clip_skip):
    """Noise instead of pictures that are drawn and made noisy."""
    count = len(prompts) * output_error.NOISE_LEVELS
    side = pipe.unet.config.sample_size
    times = torch.linspace(100, 900, output_error.NOISE_LEVELS).long().repeat(len(prompts))
    return torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(0)), times


def run(*words):
    return main([*map(str, words)])


def test_fuse_distills_says_how_well_and_goes_on_where_it_was_interrupted(files, capsys, monkeypatch):
    command = ["fuse", "rex.safetensors", "tom.safetensors", "--method", "distill", "--base", "base", *QUICK]
    assert run(*command, "-o", "whole.safetensors", "--checkpointing_steps", 0) == 0
    shown = capsys.readouterr().out
    assert "4 steps in" in shown and "what the 2 concepts do" in shown and "other prompts change by" in shown
    optimize = loop._Distillation._optimize

    def interrupted(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return optimize(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Distillation, "_optimize", interrupted)
        assert run(*command, "-o", "both.safetensors", "--checkpointing_steps", 3) == 130
    message = capsys.readouterr().err
    assert "stopped after step 3. Continue after checkpoint-3 with:" in message
    (again,) = [line for line in message.splitlines() if line.startswith("  fusion fuse")]
    assert main(shlex.split(again)[1:]) == 0
    assert "resumed after step 3 of 4" in capsys.readouterr().out
    whole, both = fusion.load("whole.safetensors"), fusion.load("both.safetensors")
    assert whole.digest() == both.digest() and both.info.name == "both" and not both.gated
    assert run("inspect", "both.safetensors") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "distilled keeps" in shown and "<rex> <tom>" in shown and "method distill" in shown
    monkeypatch.setattr(output_error, "_noisy", noisy)
    few = ["--base", "base", "--prompts", "a {token}", "--concept_free", "a dog"]
    for file, least, most in (("both", 0.01, 2), ("gated", 0, 0)):
        run("fuse", "rex.safetensors", "tom.safetensors", "-o", "gated.safetensors")
        capsys.readouterr()
        assert run("evaluate", f"{file}.safetensors", "--distilled_from", "gated.safetensors", *few, "--json") == 0
        errors = json.loads(capsys.readouterr().out)
        assert {*errors["output_error"]} == {"<rex>", "<tom>"}
        assert all(least <= error <= most for error in (*errors["output_error"].values(), errors["several"]))
        assert errors["drift"] < 0.1


def test_export_distills_in_one_go_and_recommends_it(files, capsys):
    assert run("export", "rex.safetensors", "--to", "kohya", "-o", "plain.safetensors") == 0
    assert "--distill" in capsys.readouterr().out
    out = ["--to", "kohya", "--distill", "--base", "base", "-o", "rex_lora.safetensors", "--checkpointing_steps", 0]
    for _ in range(2):  # an earlier export of the same adapter is replaced
        assert run("export", "rex.safetensors", *out, *QUICK) == 0
    shown = capsys.readouterr().out
    assert "what the adapter does" in shown and "cannot be gated" not in shown
    assert (files / "rex_lora_rex.safetensors").is_file()
    with safe_open("rex_lora.safetensors", framework="pt") as file:
        shapes = {tuple(file.get_slice(key).get_shape()) for key in file.keys() if key.endswith("down.weight")}  # noqa: SIM118
        assert {rank for rank, *_ in shapes} == {4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fuse", "rex.safetensors", "-o", "a.safetensors", "--kv_rank", 3], "a setting of --method distill"),
        (["fuse", "rex.safetensors", "-o", "a.safetensors", "--method", "distill", "--energy", 0.9], "--energy"),
        (["export", "rex.safetensors", "--to", "kohya", "-o", "a.safetensors", "--decoys", 3], "of --distill"),
        (["export", "rex.safetensors", "--to", "kohya", "--distill", "-o", "a.safetensors", "--decoys", -1], "decoys"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line_before_the_base_is_opened(files, capsys, words, said):
    assert run(*words, *(["--base", "nowhere"] if "--distill" in words or "distill" in words else [])) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
