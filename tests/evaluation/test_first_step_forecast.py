"""forecast: one step of the UNet predicts which adapters disturb each other; gated ones do not."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

import fusion
import tiny
from fusion.evaluation import first_step_forecast
from fusion.evaluation.clip_judge import open_judge
from fusion.evaluation.first_step_forecast import first_step_pictures
from fusion.models.attachment import attach
from trained import trained_adapter

TOKENS = ("<rex>", "<tom>")
PROMPT = "a {first}"
SEEDS = [0]  # so that what is drawn alone is its own reference, and similarity 1


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tiny.save_judge(folder)
    return open_judge(folder, device="cpu")


@pytest.fixture(scope="module")
def toy():
    return tiny.pipeline("sd1")


@pytest.fixture
def sensitive(monkeypatch):
    """Take differences seriously that are as small as those between pictures of untrained networks."""
    monkeypatch.setattr(first_step_forecast, "MIN_EFFECT", 1e-6)


def taught(toy, *, gated, strengths=(1.0, 1.0)):
    """Two adapters, and as references of each what the first step expects of it alone."""
    adapters = [trained_adapter(toy, token, k=k, gated=gated) for k, token in enumerate(TOKENS)]
    adapters = [
        replace(one, branches=(replace(one.branches[0], strength=strength),))
        for one, strength in zip(adapters, strengths, strict=True)
    ]
    references = {}
    for token, adapter in zip(TOKENS, adapters, strict=True):
        with attach(toy, adapter):
            references[token] = first_step_pictures(toy, f"a {token}", SEEDS)
    return adapters, references


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_expected_is_a_picture_drawn_in_one_step(family):
    pipe = tiny.pipeline(family)
    (one,) = first_step_pictures(pipe, "a dog", [3])
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    side = pipe.unet.config.sample_size
    noise = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(3))
    drawn = pipe("a dog", num_inference_steps=1, guidance_scale=1.0, latents=noise, output_type="np").images[0]
    seen = torch.tensor(list(one.tobytes())).view(drawn.shape) / 255
    assert (seen - torch.from_numpy(drawn)).abs().max() <= 1 / 255 + 1e-5
    assert torch.from_numpy(drawn).std() > 0.01


def test_gated_concepts_lose_nothing(toy, judge, sensitive):
    adapters, references = taught(toy, gated=True)
    predicted = fusion.forecast(toy, adapters, references, judge, prompt=PROMPT, seeds=SEEDS)
    assert predicted.tokens == list(TOKENS) and predicted.lost == [[None, 0.0], [0.0, None]]
    assert fusion.compatibility(adapters, toy, forecast=predicted).verdict == "compatible"


def test_the_disturbing_adapter_is_named(toy, judge, sensitive):
    """Ungated, one of them thirty times as strong: the other one loses, by the quotient of similarities."""
    adapters, references = taught(toy, gated=False, strengths=(30.0, 1.0))
    predicted = fusion.forecast(toy, adapters, references, judge, prompt=PROMPT, seeds=SEEDS)
    with attach(toy, adapters[0]), attach(toy, adapters[1]):
        both = judge.pictures(first_step_pictures(toy, "a <tom>", SEEDS))
    own = judge.pictures(references["<tom>"])
    noun = judge.pictures(first_step_pictures(toy, "a dog", SEEDS))
    a, f, n = (float((rows @ own.T).mean()) for rows in (own, both, noun))
    assert predicted.lost[0][1] == pytest.approx((a - f) / (a - n), rel=1e-3)
    assert predicted.lost[0][1] > 0.25
    report = fusion.compatibility(adapters, toy, forecast=predicted)
    assert report.verdict == "caution" and report.forecast == predicted
    assert any(line.startswith("<tom> will lose about") and "to <rex>" in line for line in report.problems)


def test_concepts_of_one_fused_file_are_told_apart(toy, judge, sensitive):
    adapters, references = taught(toy, gated=False, strengths=(3.0, 1.0))
    apart = fusion.forecast(toy, adapters, references, judge, prompt=PROMPT, seeds=SEEDS)
    fused = fusion.fuse(adapters, allow_overlap=True)
    together = fusion.forecast(toy, [fused], references, judge, prompt=PROMPT, seeds=SEEDS)
    assert together.tokens == apart.tokens
    assert together.lost[0][1] == pytest.approx(apart.lost[0][1], abs=1e-3)


def test_without_references_nothing_is_predicted_of_a_concept(toy, judge, sensitive):
    adapters, references = taught(toy, gated=False)
    predicted = fusion.forecast(toy, adapters, {"<tom>": references["<tom>"]}, judge, prompt=PROMPT, seeds=SEEDS)
    assert [row[0] for row in predicted.lost] == [None, None] and predicted.lost[0][1] is not None


def test_of_a_concept_that_adds_nothing_to_its_noun_nothing_is_predicted(toy, judge):
    adapters, references = taught(toy, gated=False)
    predicted = fusion.forecast(toy, adapters, references, judge, prompt=PROMPT, seeds=SEEDS)
    assert predicted.lost == [[None, None], [None, None]]
    assert not any("will lose" in line for line in fusion.compatibility(adapters, toy, forecast=predicted).problems)
