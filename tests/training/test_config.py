"""Laws of TrainingConfig: it reads back, it explains itself, it contradicts contradictions."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pytest
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from PIL import Image

import tiny
from fusion.adapters import ADAPTERS
from fusion.config import read_base_defaults, settings_of
from fusion.distillation.config import DistillationConfig
from fusion.errors import ConfigError
from fusion.generation.config import GenerationConfig
from fusion.training.config import TrainingConfig
from fusion.training.training_data import TrainingData

ROOT = Path(__file__).parent.parent.parent
NEEDED = {"token": "<dog>", "instance_data_dir": "/data/dog"}
FIELDS = TrainingConfig.model_fields
# A value other than the default for every field, all of which agree.
EVERY = NEEDED | {
    "pretrained_model_name_or_path": "runwayml/sd", "revision": "main", "variant": "fp16", "noun": "dog",
    "base_config": "/configs", "rescale_betas_zero_snr": True, "pretrained_vae_model_name_or_path": "madebyollin/vae",
    "num_vectors": 2, "instance_prompt": "a photo of [trigger]", "repeats": 3,
    "resolution": 512, "center_crop": False, "random_flip": True,
    "use_masks": False, "unmasked_weight": 0.5, "adapter_type": "lora", "rank": 4, "slice": 3, "layout": "strided",
    "slots": 4, "targets": ["unet.attn2"], "gating": "none", "guard": 16, "balance_slices": True, "library": "/lib",
    "exclusive_slice": True,
    "optimizer": "adafactor", "learning_rate": 2e-4, "text_encoder_lr": 0.0, "token_lr": 1,
    "lr_scheduler": "polynomial", "lr_warmup_steps": 10, "max_train_steps": 20, "train_batch_size": 1,
    "gradient_accumulation_steps": 4, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "snr_gamma": 5.0, "noise_offset": 0.01,
    "prediction_type": "v_prediction", "seed": 7, "with_prior_preservation": True, "class_data_dir": "/class",
    "class_prompt": "a dog", "num_class_images": 10, "prior_loss_weight": 0.5, "sample_batch_size": 2,
    "quiet_loss_weight": 2.0, "mixed_precision": "bf16", "gradient_checkpointing": True, "cuda_graphs": False,
    "deterministic": True, "cache_latents": False,
    "validation_prompt": ["a {token}"], "num_validation_images": 1, "validation_steps": 5, "output_dir": "/out",
    "output_name": "rex", "save_precision": "float32", "checkpointing_steps": 7, "checkpoints_total_limit": 2,
    "resume_from_checkpoint": "latest", "report_to": "tensorboard",
    "trigger_word": "rex", "caption_extension": ".caption", "shuffle_caption": True, "keep_tokens": 1,
    "keep_tokens_separator": "|||", "caption_dropout_rate": 0.1, "enable_bucket": True, "min_bucket_reso": 128,
    "max_bucket_reso": 768, "bucket_reso_steps": 32, "clip_skip": 1,
}  # fmt: skip


def config(**values) -> TrainingConfig:
    return TrainingConfig(**NEEDED | values)


def problem(**values) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**values)
    return str(caught.value)


def test_every_field_survives_the_file(tmp_path):
    assert EVERY.keys() == FIELDS.keys()
    full = TrainingConfig(**EVERY)
    assert all(getattr(full, name) != field.default for name, field in FIELDS.items())
    (tmp_path / "dog.toml").write_text(full.to_toml(), encoding="utf-8")
    again = TrainingConfig.from_toml(tmp_path / "dog.toml")
    assert again == full
    assert again.model_fields_set == full.model_fields_set


def test_nothing_that_has_a_default_may_be_none_so_toml_can_say_everything():
    for name, field in FIELDS.items():
        assert type(None) not in get_args(field.annotation) or field.default is None, name


def test_every_field_says_what_it_is_for():
    assert [name for name, field in FIELDS.items() if not (field.description or "").endswith(".")] == []


def test_groups_begin_in_the_order_of_the_fields():
    order = list(FIELDS)
    starts = [order.index(name) for name in TrainingConfig.groups.values()]
    assert starts[0] == 0
    assert starts == sorted(starts)


def test_defaults_are_names_that_exist():
    assert config().adapter_type in ADAPTERS
    known = {scheduler.value for scheduler in TYPE_TO_SCHEDULER_FUNCTION}
    assert set(get_args(FIELDS["lr_scheduler"].annotation)) <= known


@pytest.mark.parametrize("token", ["dog", "<Dog>", "<my dog>", "<>", "<dog", "<dög>"])
def test_a_token_stands_in_angle_brackets(token):
    assert "like <dog>" in problem(token=token)


@pytest.mark.parametrize("name", ["../dog", "a/b", ".hidden", "", "a\\b"])
def test_a_name_is_no_path(name):
    assert "output_name must be up to 200 letters, no / or \\, the first no dot, got" in problem(output_name=name)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"with_prior_preservation": True}, "needs a class_prompt"),
        ({"class_prompt": "a dog"}, "without with_prior_preservation"),
        ({"with_prior_preservation": True, "class_prompt": "a <dog>"}, "must not name <dog>"),
        ({"with_prior_preservation": True, "class_prompt": "a {token}"}, "must not name <dog>"),
        ({"instance_prompt": "a photo"}, "lacks {token}"),
        ({"lr_warmup_steps": 2000}, "beyond max_train_steps 1250"),
        ({"lr_warmup_steps": 5, "lr_scheduler": "constant"}, "constant_with_warmup"),
        ({"layout": "strided", "slice": 8}, "the last is 7"),
        ({"resume_from_checkpoint": "latest", "checkpointing_steps": 0}, "checkpointing_steps"),
        ({"targets": []}, "targets is empty"),
        ({"resolution": 0}, "resolution must be between 1 and 4096, got 0."),
        ({"resolution": 80_000}, "resolution must be between 1 and 4096, got 80000."),
        ({"seed": 2**63}, "seed must be between 0 and 9223372036854775807, got 9223372036854775808."),
        ({"seed": -1}, "seed must be between 0 and 9223372036854775807, got -1."),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, got inf."),
        ({"train_batch_size": 10**6}, "train_batch_size must be between 1 and 1024, got 1000000."),
        ({"repeats": 10**9}, "repeats must be between 1 and 10000, got 1000000000."),
        ({"instance_prompt": "a {token}" * 2000}, "instance_prompt must have at most 10000 characters"),
        ({"validation_prompt": ["a {token}"] * 65}, "validation_prompt must have at most 64 items"),
        ({"learning_rate": 1e30}, "learning_rate must be more than 0 and at most 1000000, got 1e+30."),
        ({"output_name": "x" * 300}, "output_name"),
        ({"unmasked_weight": float("nan")}, "unmasked_weight must be a finite number, got nan."),
    ],
)
def test_contradictions_are_refused(values, said):
    assert said in problem(**values)


def test_several_contradictions_are_said_together():
    assert problem(with_prior_preservation=True, targets=[]).startswith("2 problems:")


def test_what_is_allowed_is_allowed():
    config(gating="none", instance_prompt="a photo")
    config(lr_scheduler="constant_with_warmup", lr_warmup_steps=5)
    config(instance_prompt="a photo of <dog>", resume_from_checkpoint="out/checkpoint-5", checkpointing_steps=0)


def test_other_names_are_the_same_settings(tmp_path):
    made = TrainingConfig(placeholder_token="<dog>", instance_data_dir="/data/dog", base="runwayml/sd")
    assert made == config(pretrained_model_name_or_path="runwayml/sd")
    assert made.model_fields_set == {"token", "instance_data_dir", "pretrained_model_name_or_path"}
    assert "'token' and 'placeholder_token' are two names of one setting" in problem(placeholder_token="<cat>")
    (tmp_path / "dog.toml").write_text('placeholder_token = "<dog>"\ninstance_data_dir = "/data/dog"\n')
    assert TrainingConfig.from_toml(tmp_path / "dog.toml", {"token": "<cat>"}).token == "<cat>"


def test_a_resolution_must_suit_the_base(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "dog.png")
    pipe = tiny.pipeline("sd1")
    for resolution, multiple in ((16, None), (17, 2)):
        settings = config(instance_data_dir=tmp_path, resolution=resolution)
        with pytest.raises(ConfigError, match=f"a multiple of {multiple}") if multiple else nullcontext():
            TrainingData(pipe, settings)


def test_every_number_of_every_setting_has_a_bound_that_a_machine_can_bear():
    for model in (TrainingConfig, GenerationConfig, DistillationConfig):
        needed = {TrainingConfig: NEEDED, GenerationConfig: {"prompt": "a dog"}}.get(model, {})
        for setting in settings_of(model):
            if kinds := {int, float} & setting.kinds:
                huge = [10**30, -(10**30)] if int in kinds else [1e30, -1e30, float("nan"), float("inf")]
                for value in huge:
                    with pytest.raises(ConfigError, match=f"^{setting.name} must be "):
                        model(**needed | {setting.name: value})


def test_placeholders_become_the_token():
    made = config(validation_prompt=["a {token}", "[trigger] asleep"])
    assert made.validation_prompts() == ("a <dog>", "<dog> asleep")
    assert config(validation_prompt="a {token}").validation_prompts() == ("a <dog>",)
    assert config().validation_prompts() == ()


def test_base_defaults_fill_only_what_the_user_left_open():
    table = read_base_defaults(ROOT / "assets/pocket", "training")
    assert config().with_base_defaults(table).rank == table["rank"]
    assert config(rank=3).with_base_defaults(table).rank == 3
    assert config(resolution=None).with_base_defaults(table).resolution == table["resolution"]
    assert config().with_base_defaults({}) == config()


def test_base_defaults_are_checked_as_the_users_are():
    for table in ({"rnak": 4}, {"rank": "four"}, {"lr_warmup_steps": 10_000}):
        with pytest.raises(ConfigError, match=r"the base's fusion\.toml"):
            config().with_base_defaults(table)


@pytest.mark.parametrize(
    "name",
    [
        *("token", "placeholder_token", "output_name", "report_to", "base"),
        *("output_dir", "instance_data_dir", "resume_from_checkpoint", "library"),
        *("checkpointing_steps", "checkpoints_total_limit", "save_precision", "validation_prompt", "class_prompt"),
    ],
)
def test_a_base_may_not_choose_files_or_tokens(name):
    with pytest.raises(ConfigError, match=f"'{TrainingConfig.aliases.get(name, name)}', which only you may"):
        config().with_base_defaults({name: "/elsewhere"})


def test_lasting_settings_are_json_and_tell_nothing_of_this_machine(tmp_path):
    made = TrainingConfig(**EVERY | {"instance_data_dir": tmp_path, "pretrained_model_name_or_path": str(tmp_path)})
    text = json.dumps(made.lasting_settings())
    assert str(tmp_path) not in text and "/out" not in text
    assert made.lasting_settings()["rank"] == 4


def test_latents_are_kept_only_if_pictures_come_the_same_way_each_time():
    assert config().caches_latents()
    assert not config(random_flip=True).caches_latents()
    assert not config(center_crop=False).caches_latents()
    assert not config(cache_latents=False).caches_latents()


def test_class_pictures_of_different_prompts_lie_apart():
    dog = config(with_prior_preservation=True, class_prompt="a dog")
    cat = config(with_prior_preservation=True, class_prompt="a cat")
    assert dog.class_folder() != cat.class_folder()
    assert config(with_prior_preservation=True, class_prompt="a", class_data_dir="/c").class_folder() == Path("/c")


def test_the_example_concepts_can_be_trained_as_they_lie():
    for folder in sorted((ROOT / "assets/concepts").iterdir()):
        assert TrainingConfig(token=f"<{folder.name}>", instance_data_dir=folder).with_base_defaults({})
