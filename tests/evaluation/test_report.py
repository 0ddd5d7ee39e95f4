"""evaluate: on toy pipelines, where what gates promise can be checked exactly."""

import pytest

import fusion
import tiny
from fusion.errors import ConfigError
from trained import trained_adapter

pytestmark = pytest.mark.usefixtures("few_steps")


def test_gated_concepts_are_unchanged_and_ungated_ones_are_not():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    report = fusion.evaluate(pipe, adapters, prompts=["a {token}"], concept_free=["a dog"])
    assert report.gated.output_error == {"<rex>": 0.0, "<tom>": 0.0} and report.gated.drift == 0.0
    assert min(report.ungated.output_error.values()) > 0 and report.ungated.drift > 0
    assert report.to_json()["compatibility"]["verdict"] == "compatible"
    assert "| <rex> | 0.000 |" in report.to_markdown()


def test_a_fused_adapter_is_measured_concept_by_concept():
    pipe = tiny.pipeline("sd1")
    fused = fusion.fuse([trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)])
    report = fusion.evaluate(pipe, [fused], prompts=["a {token}"], concept_free=["a dog"])
    assert report.gated.output_error == {"<rex>": 0.0, "<tom>": 0.0}


def test_mistakes_are_named():
    pipe = tiny.pipeline("sd1")
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        fusion.evaluate(pipe, [])
    with pytest.raises(ConfigError, match="token"):
        fusion.evaluate(pipe, [trained_adapter(pipe)], prompts=["a dog"])
    with pytest.raises(ConfigError, match="1 to 10000; got 0"):
        fusion.evaluate(pipe, [trained_adapter(pipe)], seeds=0)
