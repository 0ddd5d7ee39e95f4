"""The measurements run at toy size and count right; what they measure at full size is in benchmarks/RESULTS.md."""

import pytest
import torch
from recorded_kernels import Kernels

from benchmarks import drawing
from benchmarks.__main__ import measurement
from benchmarks.bases import Base
from benchmarks.clock import Timing, interleaved, paired
from benchmarks.gpu import __main__ as gpu
from benchmarks.memory import peak_bytes, storage_bytes
from benchmarks.report import Section, bar, table, write
from benchmarks.training import Steps, captured
from benchmarks.variants import VARIANTS
from fusion.models.layer_sites import sites


@pytest.fixture(scope="module")
def base():
    return Base(toy=True)


def silent(_line):
    pass


@pytest.mark.parametrize("name", ["fusing", "files", "spectra", "regression"])
def test_a_measurement_gives_a_section(base, name):
    section = measurement(name)(base, silent)
    assert section.title and section.text
    assert all(block.startswith("| ") for block in section.tables)


def test_after_a_pictures_first_call_gated_adapters_cost_no_operator(base):
    """None is started that the base would not start, and no prompt is projected where adapters act."""
    gated = [base.adapter("additive", k, gated=True) for k in range(50)]
    most, projections = drawing.operators(base, [], drawing.PLAIN)
    assert projections == sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name in sites(base.pipe))
    for count in (1, 10, 50):
        for prompt in (drawing.PLAIN, drawing.ONE):
            operators, of_prompt = drawing.operators(base, gated[:count], prompt)
            assert operators <= most - projections and not of_prompt


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "headings"),
    [
        (("--only", "checks"), ()),
        (("--only", "numbers"), ("batch 1", "batch 4", "drawing")),
        (("--compiled",), ("compiled UNets",)),
        (("--sdxl",), ("SDXL's training step",)),
    ],
    ids=["checks", "numbers", "compiled", "sdxl"],
)
def test_the_check_of_a_gpu_runs_on_a_cpu_at_toy_size(flags, headings, monkeypatch, tmp_path, capsys):
    """With a recorder of operators in place of CUDA graphs."""
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path))
    output = tmp_path / "results.md"
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--steps", "2", "--output", str(output), *flags])
    monkeypatch.setattr("benchmarks.gpu.checks.SECONDS", 3600)
    monkeypatch.setattr("benchmarks.training.can_capture", lambda _: True)
    monkeypatch.setattr("benchmarks.training.CudaGraph", Kernels)
    assert gpu.main() == 0
    shown, written = capsys.readouterr().out, output.read_text(encoding="utf-8")
    assert "FAIL" not in shown and all(f"{heading}\n" in text for heading in headings for text in (shown, written))
    if "numbers" in flags or "--sdxl" in flags:
        assert "| additive, token-gated, captured |" in shown


def test_a_captured_step_of_two_sizes_has_the_eager_steps_gradients(monkeypatch):
    monkeypatch.setattr("benchmarks.training.can_capture", lambda _: True)
    monkeypatch.setattr("benchmarks.training.CudaGraph", Kernels)
    monkeypatch.setattr("fusion.models.prompt_layout.has_fixed_kernels", lambda _: True)
    base, parameters = Base(toy=True, family="sdxl"), []
    for is_captured in (False, True):
        variant = VARIANTS["additive, token-gated"](base)
        steps = {"": Steps(base, variant, batch=2, sizes=[(8, 8), (6, 10)])}
        call = captured(steps, base.device)[""] if is_captured else steps[""].seconds
        if is_captured:
            for parameter in variant.parameters:
                parameter.grad.zero_()  # a recorder computes while it captures
        call()
        parameters.append(variant.parameters)
    assert all(torch.equal(one, other) for one, other in zip(*parameters, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training", "drawing", "balance"])
def test_a_long_measurement_gives_a_section(base, name):
    assert measurement(name)(base, silent).tables


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_what_it_names_and_leaves_the_pipeline_as_found(base, name):
    before = {where: site.module for where, site in sites(base.pipe).items()}
    variant = VARIANTS[name](base)
    start = [p.detach().clone() for p in variant.parameters]
    steps = Steps(base, variant)
    assert steps.seconds() > 0
    steps.seconds()
    assert all(not torch.equal(p, old) for p, old in zip(variant.parameters, start, strict=True))
    assert {where: site.module for where, site in sites(base.pipe).items()} == before


def test_peak_memory_counts_what_exists_at_once():
    def work():
        torch.empty(1000)  # released at once
        kept = torch.empty(3000)
        return kept.clone()

    assert peak_bytes(work) == 4 * 6000
    whole = torch.zeros(10)
    assert storage_bytes([whole, whole[:5]]) == 40


def test_turns_are_taken_and_the_first_round_is_not_counted():
    turns: list[str] = []
    timing = interleaved({n: lambda n=n: turns.append(n) or 1.0 for n in ("a", "b")}, 2, silent)
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert timing["a"].seconds == (1.0, 1.0)
    assert paired(Timing((2.0, 9.0, 4.0)), Timing((1.0, 1.0, 2.0))) == 2.0


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "RESULTS.md"
    write(path, [Section("One", "old"), Section("Two", "kept", [table(["a", "b"], [["1", bar(2, 1)]])])])
    write(path, [Section("One", "new")])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks\n\n## One\n\nnew\n\n## Two\n\nkept\n\n| a | b |\n| --- | ---: |\n")
    assert "**missed**" in text
    assert "old" not in text
