"""What would teach, log or do nothing is said before the first step."""

import logging

import pytest
from toy_training import config

import fusion
import tiny
from fusion.errors import ConfigError
from fusion.generation.config import GenerationConfig
from fusion.models.denoising import encode_prompts
from fusion.training.config import RATES, TrainingConfig
from fusion.training.optimizers import PACKAGES
from fusion.training.setting_warnings import warnings_about


def words(count: int) -> str:
    return " ".join(["dog"] * count)


@pytest.mark.parametrize("frozen", [{}, {"text_encoder_lr": 0.0, "token_lr": 0.0}])
def test_captions_of_any_length_are_learned_from(frozen, pictures):
    """A token beyond what a text encoder reads at once acts as in a short caption; a batch may have both."""
    for k in range(3):
        (pictures / f"{k}.txt").write_text("a <dog>" if k == 2 else f"{words(20)} <dog>")
    settings = config(pictures, validation_prompt=f"{words(20)} {{token}}", num_validation_images=1, **frozen)
    untrained, *_, last = [step.adapter.digest() for step in fusion.train(tiny.pipeline("sd1"), settings)]
    assert untrained != last
    pipe, long = tiny.pipeline("sd1"), f"{words(20)} <dog>"
    one = next(fusion.train(pipe, settings.updated({"max_train_steps": 1}))).adapter
    base = encode_prompts(pipe, [f"{words(20)} dog"]).states
    with fusion.attach(pipe, one):
        assert encode_prompts(pipe, [long]).states.shape == base.shape and base.shape[1] == 2 * 16


def test_a_tracker_that_is_not_installed_is_refused_before_the_work(pictures, caplog):
    pipe = tiny.pipeline("sd1")
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match="report_to = 'swanlab' would log nothing"):
        next(fusion.train(pipe, config(pictures, report_to="swanlab", slots=4)))
    assert not (pictures.parent / "out").exists()


def test_settings_that_do_nothing_are_named(caplog, tmp_path):
    pipe = tiny.pipeline("sd1")
    about = {
        "regions = 'auto'": {"regions": "auto"},
        "negative_prompt": {"negative_prompt": "snow", "guidance_scale": 1.0},
        "image_strength": {"image_strength": 0.3},
    }
    for name, settings in about.items():
        caplog.clear()
        fusion.generate(pipe, GenerationConfig(prompt="a dog", num_inference_steps=1, **settings))
        assert [record.getMessage().partition(" does nothing")[0] for record in caplog.records] == [name]
    settings = config(
        tmp_path, num_class_images=5, slots=4, guard=3, validation_steps=5, checkpoints_total_limit=2, use_masks=False,
        unmasked_weight=0.3, targets=["unet.attn2"], revision="main",
    )  # fmt: skip
    assert [text.partition(" does nothing w")[0] for text in warnings_about(settings)] == [
        "num_class_images", "unmasked_weight", "slots", "guard", "validation_steps", "checkpoints_total_limit",
        "text_encoder_lr", "revision",
    ]  # fmt: skip
    assert warnings_about(config(tmp_path, text_encoder_lr=1e-5)) == []


def test_learning_rates_suit_the_optimizer(tmp_path, monkeypatch):
    """Prodigy's are 1 where nothing is set, whatever the base sets for AdamW; what is of the other kind is named."""
    base = {"learning_rate": 3e-3, "text_encoder_lr": 3e-3, "token_lr": 5e-3}

    def rates(**settings):
        whole = TrainingConfig(token="<dog>", instance_data_dir=tmp_path, **settings).with_base_defaults(base)
        return [getattr(whole, name) for name in RATES], warnings_about(whole)

    assert rates() == ([3e-3, 3e-3, 5e-3], [])
    assert rates(optimizer="prodigy") == ([1.0, 1.0, 1.0], [])
    assert rates(optimizer="prodigy", learning_rate=0.5, text_encoder_lr=0.0)[0] == [0.5, 0.0, 0.5]
    assert (
        "learning_rate = 0.0001 is low with optimizer = 'prodigy'"
        in rates(optimizer="prodigy", learning_rate=1e-4)[1][0]
    )
    assert "token_lr = 1 is high with optimizer = 'adamw'" in rates(token_lr=1.0)[1][0]
    with pytest.raises(
        ConfigError, match=r"finds one learning rate for all; learning_rate = 1 and token_lr = 0.5 must"
    ):
        rates(optimizer="prodigy", learning_rate=1.0, token_lr=0.5)
    monkeypatch.setattr("fusion.training.optimizers.find_spec", lambda name: None)
    for name, package in PACKAGES.items():
        with pytest.raises(ConfigError, match=rf"'{name}' needs a package .* run: pip install {package}$"):
            next(fusion.train(tiny.pipeline("sd1"), config(tmp_path, optimizer=name, token_lr=1e-2)))
