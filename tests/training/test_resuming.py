"""Resuming keeps its promise: the same bits as without an interruption, under the same settings, of the same run."""

import itertools
import json
import random
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_training import config, parameters, run, same

import fusion
import tiny
from fusion.errors import ConfigError, FormatError, FusionError, SliceConflict
from fusion.formats.safetensors_file import opened
from fusion.training.accelerator import accelerated
from fusion.training.checkpoint import read_checkpoint
from fusion.training.config import MAY_CHANGE
from fusion.training.loss import denoising_loss
from fusion.training.optimizers import PACKAGES
from fusion.training.setup import named_parameters, parameter_groups
from fusion.training.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("shared_cache", "few_steps")

# For every lasting setting, another value than the toy training's.
OTHER = {
    "revision": "main", "variant": "fp16", "token": "<cat>", "noun": "cat", "num_vectors": 2,
    "instance_prompt": "a photo of {token}", "repeats": 2, "resolution": 24, "center_crop": False, "random_flip": True,
    "use_masks": False, "unmasked_weight": 0.5, "adapter_type": "lora", "rank": 2, "slice": 1, "layout": "strided",
    "slots": 4, "targets": ["unet.attn1"], "gating": "none", "guard": 8, "balance_slices": True,
    "optimizer": "adafactor",
    "learning_rate": 1e-3, "text_encoder_lr": 1e-3, "token_lr": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
    "max_train_steps": 4, "train_batch_size": 1, "gradient_accumulation_steps": 2, "adam_beta1": 0.8,
    "adam_beta2": 0.99, "adam_weight_decay": 0.0, "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "snr_gamma": 5.0,
    "noise_offset": 0.1, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "seed": 1,
    "with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3, "prior_loss_weight": 0.5,
    "quiet_loss_weight": 1.0, "mixed_precision": "bf16", "trigger_word": "rex", "shuffle_caption": True,
    "keep_tokens": 1, "keep_tokens_separator": "|||", "caption_dropout_rate": 0.5, "enable_bucket": True,
    "min_bucket_reso": 8, "max_bucket_reso": 64, "bucket_reso_steps": 8, "clip_skip": 1,
}  # fmt: skip
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}


@cache
def toy():
    """One pipeline for the whole module: a training leaves it as it was."""
    return tiny.pipeline("sd1")


def resume(settings, name="latest", **others):
    return settings.updated({"resume_from_checkpoint": str(name), **others})


def interrupted(pictures, after=2, **settings):
    """A training that was stopped `after` some of its steps, with a checkpoint at each."""
    settings = config(pictures, **{"checkpointing_steps": 1, "max_train_steps": 3, **settings})
    steps = list(itertools.islice(fusion.train(toy(), settings), after))
    return settings, steps


def as_earlier(checkpoint, folder=None):
    """The same checkpoint as earlier versions wrote it: settings in state.json, no run, no digest."""
    with opened(checkpoint / "state.safetensors") as file:
        state = json.loads(file.metadata["state"])
    lasting = state["lasting"]
    names = ("seed", "adapter_type", "max_train_steps", "train_batch_size", "learning_rate", "quiet_loss_weight")
    settings = {name: lasting[name] for name in names} | {"examples": lasting["pictures"], "slices": [lasting["slice"]]}
    earlier = (folder or checkpoint.parent.parent) / checkpoint.name
    earlier.mkdir(parents=True)
    save_file(load_file(checkpoint / "state.safetensors"), earlier / "state.safetensors")
    groups = [{"lr": 1e-2, "params": [0]}]
    content = {"settings": settings, "scheduler": {"last_epoch": state["step"]}, "groups": groups}
    (earlier / "state.json").write_text(json.dumps(content))
    return earlier


def restore(path, step, settings):
    """Read a checkpoint into an optimizer as the training of `step` has it."""
    optimizer = torch.optim.AdamW(parameter_groups(toy(), step.adapter, settings, {}))
    checkpoint = read_checkpoint(path, step.adapter.info.provenance.settings)
    checkpoint.restore(named_parameters(step.adapter), optimizer, torch.amp.GradScaler("cpu"))


EXTRAS = [
    {},
    {"gradient_accumulation_steps": 2, "center_crop": False, "random_flip": True},
    {"optimizer": "adafactor"},
    {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 1.0, "token_lr": 1.0},
    {"optimizer": "adamw8bit"},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_resuming_is_exact(extra, pictures):
    if package := PACKAGES.get(extra.get("optimizer")):
        pytest.importorskip(package)
    settings = config(pictures, max_train_steps=6, checkpointing_steps=3, lr_scheduler="cosine", **extra)
    steps, whole = run(toy(), settings)
    assert steps[2].checkpoint.name == "checkpoint-3"
    again, resumed = run(toy(), resume(settings, steps[2].checkpoint))
    assert [step.step for step in again] == [4, 5, 6] and {step.resumed for step in again} == {3}
    assert [(s.loss, s.learning_rate) for s in again] == [(s.loss, s.learning_rate) for s in steps[3:]]
    assert same(whole, resumed)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "constant", "constant_with_warmup"])
def test_the_learning_rate_goes_on_where_it_was(schedule, pictures):
    warmup = {} if schedule == "constant" else {"lr_warmup_steps": 2}
    settings, steps = interrupted(pictures, after=3, lr_scheduler=schedule, **warmup)
    again, resumed = run(toy(), resume(settings, "checkpoint-1"))
    assert [s.learning_rate for s in again] == [s.learning_rate for s in steps[1:]]
    assert same(parameters(steps[-1]), resumed)


def test_a_resumed_training_goes_on_with_its_own_slice(pictures, caplog):
    settings, _ = interrupted(pictures, max_train_steps=4)
    _, whole = run(toy(), settings.updated({"output_dir": pictures.parent / "whole"}))
    other = config(pictures, token="<cat>", max_train_steps=1)
    (last,) = fusion.train(toy(), other)  # takes the slice that is free for the moment
    fusion.save(last.adapter, settings.output_dir / "cat.safetensors")
    with pytest.raises(SliceConflict, match="'cat'"):
        list(fusion.train(toy(), resume(settings, exclusive_slice=True)))
    next(fusion.train(toy(), resume(settings)))
    assert "<dog> shares slice 0-3 with 'cat' (<cat>)" in caplog.text
    (settings.output_dir / "cat.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"slice = \[0, 4, 1\], not \[4, 4, 1\]"):
        list(fusion.train(toy(), resume(settings, "checkpoint-2", slice=1)))
    _, resumed = run(toy(), resume(settings, "checkpoint-2", slice=0))  # the very slice it had
    assert same(whole, resumed)


def test_every_setting_lasts_or_may_change():
    lasting = config(Path("/pictures")).lasting_settings()
    assert lasting.keys() | MAY_CHANGE == fusion.TrainingConfig.model_fields.keys() and not lasting.keys() & MAY_CHANGE
    assert OTHER.keys() == lasting.keys()
    assert fusion.TrainingConfig.places() <= MAY_CHANGE


@pytest.mark.parametrize("prior", [{}, PRIOR])
def test_resuming_under_other_settings_is_refused_by_name(prior, pictures, monkeypatch):
    monkeypatch.setattr("fusion.formats.picture_file.MIN_SIDE", 8)  # the toy base draws 16 px
    settings, steps = interrupted(pictures, after=1, **prior)
    checkpoint, pipe, before = steps[0].checkpoint, toy(), settings.lasting_settings()
    for name, value in OTHER.items():
        changes = {name: value}
        if prior and name == "with_prior_preservation":
            changes = {"with_prior_preservation": False, "class_prompt": None}
        elif name in ("with_prior_preservation", "class_prompt"):
            changes = changes if prior else {**PRIOR, "class_prompt": "a cat"}
        if name == "token":
            changes["instance_prompt"] = "a {token}"
        # What was chosen is stored: the slice, and the precision that "auto" means for the base.
        chosen = {
            "slice": r"\[0, 4, 1\], not \[4, 4, 1\]",
            "mixed_precision": "'no', not 'bf16'",
            "clip_skip": "0, not 1",
        }
        first = "with_prior_preservation" if not prior and name == "class_prompt" else name
        values = chosen.get(name, rf"{before[name]!r}, not ") if first == name else ""
        with pytest.raises(ConfigError, match=f"was made with {first} = {values}"):
            next(fusion.train(pipe, resume(settings, checkpoint, **changes)))


def test_resuming_with_other_pictures_masks_or_base_is_refused_by_name(pictures, monkeypatch):
    monkeypatch.setattr("fusion.formats.picture_file.MIN_SIDE", 8)  # the toy base draws 16 px
    mask = Image.new("L", (48, 40), 0)
    mask.paste(255, (0, 0, 24, 40))
    mask.save(pictures / "masks" / "0.png")
    settings, steps = interrupted(pictures, after=1, **PRIOR, gating="none")
    resumed, pipe = resume(settings, steps[0].checkpoint), toy()

    def refused(name, base=pipe):
        with pytest.raises(ConfigError, match=f"was made with {name} = "):
            next(fusion.train(base, resumed))

    for name, file, picture in (
        ("masks", pictures / "masks" / "0.png", mask.point(lambda value: 255 - value)),
        ("masks", pictures / "masks" / "1.png", mask),
        ("pictures", pictures / "1.png", Image.new("RGB", (48, 40), "red")),
        ("class_pictures", settings.class_folder() / "drawn-00000.png", Image.new("RGB", (16, 16), "red")),
    ):
        before = file.read_bytes() if file.exists() else None
        picture.save(file)
        refused(name)
        file.write_bytes(before) if before else file.unlink()
    caption = pictures / "0.txt"
    caption.write_text("a <dog> asleep")
    refused("pictures")
    caption.unlink()
    refused("base", tiny.pipeline("sd2"))
    assert next(fusion.train(pipe, resumed)).step == 2


def test_what_shapes_no_adapter_may_change(pictures, tmp_path):
    settings, _ = interrupted(pictures)
    whole = run(toy(), settings.updated({"output_dir": tmp_path / "whole"}))[1]
    shutil.copytree(pictures, tmp_path / "moved")
    paths = {"instance_data_dir": tmp_path / "moved", "library": tmp_path / "library", "output_dir": tmp_path / "new"}
    kept = {"save_precision": "float32", "checkpointing_steps": 2, "checkpoints_total_limit": 1, "output_name": "rex"}
    previews = {"validation_prompt": "a {token}", "num_validation_images": 1, "validation_steps": 1}
    memory = {"cache_latents": False, "sample_batch_size": 2}
    checkpoint = next(settings.output_dir.rglob("checkpoint-2"))
    changed = resume(settings, checkpoint, **paths, **kept, **previews, **memory)
    steps, resumed = run(toy(), changed)
    assert same(whole, resumed) and len(steps[-1].images) == 1


def test_the_settings_name_the_base_that_is_open(pictures, tmp_path):
    pipe, folder = tiny.pipeline("sd1"), tmp_path / "bases" / "tiny"
    pipe.register_to_config(_name_or_path=str(folder))
    with pytest.raises(ConfigError, match="'other/base', but 'tiny' is open"):
        next(fusion.train(pipe, config(pictures, pretrained_model_name_or_path="other/base")))
    assert next(fusion.train(pipe, config(pictures, pretrained_model_name_or_path=str(folder)))).step == 1


def checkpoint_names(run):
    return sorted(path.name for path in run.glob("checkpoint-*"))


def test_only_this_runs_old_checkpoints_are_removed(pictures):
    first, _ = interrupted(pictures, after=5, max_train_steps=6)
    settings = config(pictures, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=1)
    for step in fusion.train(toy(), settings):
        assert step.checkpoint.is_dir()  # a higher one of the older run does not push it out
    runs = {run.name: checkpoint_names(run) for run in step.checkpoint.parent.parent.iterdir()}
    assert runs.pop(step.checkpoint.parent.name) == ["checkpoint-4"]
    assert list(runs.values()) == [[f"checkpoint-{n}" for n in range(1, 6)]]
    # Resumed from an early one, the run's own later ones push out none either.
    limited = resume(first, "checkpoint-2", checkpoints_total_limit=2)
    steps = list(itertools.islice(fusion.train(toy(), limited), 1))
    assert checkpoint_names(steps[0].checkpoint.parent) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-5",
    ]


def test_latest_is_the_run_with_these_settings(pictures):
    settings, steps = interrupted(pictures)
    _, whole = run(toy(), settings.updated({"output_dir": pictures.parent / "whole"}))
    interrupted(pictures, seed=1, max_train_steps=9, after=4)  # another run of this name: later, and further
    again, resumed = run(toy(), resume(settings))
    assert again[0].step == 3 and same(whole, resumed)
    assert again[-1].checkpoint.parent == steps[-1].checkpoint.parent
    with pytest.raises(ConfigError, match="seed = "):
        next(fusion.train(toy(), resume(settings, seed=2)))
    with pytest.raises(ConfigError, match="There is no checkpoint 'latest'"):
        next(fusion.train(toy(), resume(settings, output_name="rex")))
    with pytest.raises(ConfigError, match="There is no checkpoint 'checkpoint-8'"):
        next(fusion.train(toy(), resume(settings, "checkpoint-8")))


def test_two_trainings_of_one_token_at_once_keep_apart(pictures):
    settings = config(pictures, checkpointing_steps=1, checkpoints_total_limit=1)
    one, two = (fusion.train(tiny.pipeline("sd1"), settings.updated({"seed": seed})) for seed in (0, 1))
    steps = list(zip(one, two, strict=True))
    folders = {step.checkpoint.parent for pair in steps for step in pair}
    assert len(folders) == 2 and all(checkpoint_names(folder) == ["checkpoint-3"] for folder in folders)
    for seed, step in enumerate(steps[-1]):
        (last,) = fusion.train(toy(), resume(settings, seed=seed))
        assert same(parameters(last), parameters(step))


def test_a_run_has_one_identity(pictures, tmp_path):
    settings, steps = interrupted(pictures)
    again, _ = run(toy(), resume(settings))
    ids = {step.adapter.info.provenance.run for step in (*steps, *again)}
    (name,) = {step.checkpoint.parent.name for step in (*steps, *again)}
    assert ids == {name} and len(name) == 8
    fusion.save(again[-1].adapter, tmp_path / "dog.safetensors")
    stored = fusion.load(tmp_path / "dog.safetensors").info.provenance
    assert stored.run == name and stored.settings["rank"] == 4 and stored.settings["slice"] == [0, 4, 1]
    assert stored.settings["base"]["family"] == "sd1" and stored.settings["pictures"]
    (anew,) = itertools.islice(fusion.train(toy(), settings), 1)
    assert anew.adapter.info.provenance.run != name


def test_a_training_that_died_after_its_last_step_is_finished(pictures):
    settings, steps = interrupted(pictures, after=3)
    for _ in range(2):
        (last,) = fusion.train(toy(), resume(settings, validation_prompt="a {token}"))
        assert (last.step, last.total, last.resumed) == (3, 3, 3) and last.images
        assert (last.loss, last.learning_rate) == (steps[-1].loss, steps[-1].learning_rate)
        assert last.adapter.info.provenance.steps == 3
        assert same(parameters(last), parameters(steps[-1]))


def test_checkpoints_of_earlier_versions_are_resumed(pictures):
    settings, steps = interrupted(pictures)
    _, whole = run(toy(), settings.updated({"output_dir": pictures.parent / "whole"}))
    earlier = as_earlier(steps[-1].checkpoint)
    shutil.rmtree(steps[-1].checkpoint.parent)
    with pytest.raises(ConfigError, match="seed = 0, not 1"):
        next(fusion.train(toy(), resume(settings, seed=1)))
    with pytest.raises(ConfigError, match="slice = "):
        next(fusion.train(toy(), resume(settings, slice=1)))
    for name in ("latest", "checkpoint-2", earlier):
        again, resumed = run(toy(), resume(settings, name, checkpoints_total_limit=1))
        assert [step.step for step in again] == [3] and same(whole, resumed)
        assert again[-1].checkpoint.parent.parent == earlier.parent and earlier.is_dir()
        shutil.rmtree(again[-1].checkpoint.parent)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(pictures, caplog):
    settings, steps = interrupted(pictures)
    file = steps[-1].checkpoint / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FormatError, match="checkpoint-2"):
        next(fusion.train(toy(), resume(settings, steps[-1].checkpoint)))
    first = next(fusion.train(toy(), resume(settings)))
    assert first.step == 2 and "checkpoint-2" in caplog.text and "checkpoint-1" in caplog.text


def test_tensors_of_other_shapes_are_refused(pictures):
    settings, steps = interrupted(pictures, after=1)
    earlier = as_earlier(steps[0].checkpoint, pictures.parent / "earlier")
    tensors = load_file(earlier / "state.safetensors")
    name = next(name for name in tensors if name.endswith("exp_avg") and tensors[name].ndim == 2)
    parameter = next(name for name in tensors if name.startswith("parameter.unet") and tensors[name].ndim == 2)
    rest = {key: value for key, value in tensors.items() if key not in (name, parameter)}
    for changed in (
        {name: tensors[name].T.contiguous(), parameter: tensors[parameter]},
        {name: tensors[name], parameter: tensors[parameter][:, :1].contiguous()},
        {name: tensors[name]},
        {parameter: tensors[parameter]},
        {name: tensors[name], parameter: tensors[parameter], "optimizer.9999.exp_avg": tensors[name].clone()},
        {name: tensors[name], parameter: tensors[parameter], "optimizer": tensors[name].clone()},
    ):
        save_file(rest | changed, earlier / "state.safetensors")
        with pytest.raises(FormatError, match=r"does not fit this training: (optimizer|parameter)"):
            restore(earlier, steps[0], settings)
    with pytest.raises(FormatError, match=r"does not fit this training: optimizer"):
        next(fusion.train(toy(), resume(settings, earlier)))


@pytest.mark.parametrize("layout", ["today", "earlier"])
def test_a_mutated_checkpoint_is_refused(layout, pictures):
    """Wherever a checkpoint is damaged there is a FormatError, or a setting is found to differ. Nothing else."""
    settings, (step,) = interrupted(pictures, after=1)
    checkpoint = step.checkpoint
    if layout == "earlier":
        checkpoint = as_earlier(checkpoint, pictures.parent / "earlier")
    files = sorted((path, path.read_bytes()) for path in checkpoint.iterdir())
    chance, refused = random.Random(0), 0
    for _ in range(150):
        path, data = chance.choice(files)
        mutated, place = bytearray(data), chance.randrange(min(len(data), 3000))
        kind = chance.choice(["flip", "cut", "insert", "nest"])
        if kind == "flip":
            mutated[place] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del mutated[place : place + chance.randrange(1, 50)]
        elif kind == "nest":
            mutated = bytearray(b"[" * 5000)
        else:
            mutated[place:place] = chance.choice([b"null", b"-1", b"9" * 400, b"[]", b"{}", b"NaN"])
        path.write_bytes(mutated)
        try:
            restore(checkpoint, step, settings)
        except (FormatError, ConfigError):
            refused += 1
        path.write_bytes(data)
    assert refused == 150 if layout == "today" else refused > 100  # earlier versions had no digest
    restore(checkpoint, step, settings)


@pytest.mark.parametrize("value", [{}, [], None, "x", {"settings": [], "scheduler": {"last_epoch": 1}}])
def test_a_strange_state_of_an_earlier_version_is_refused(value, pictures):
    settings, steps = interrupted(pictures, after=1)
    earlier = as_earlier(steps[0].checkpoint)
    (earlier / "state.json").write_text(json.dumps(value))
    with pytest.raises(FormatError, match="cannot be read"):
        next(fusion.train(toy(), resume(settings, earlier)))


class Half:
    """accelerate's fp16 with its gradient scaler, which it has on GPUs only, on a CPU."""

    def __init__(self, monkeypatch, **options):
        self.scalers = []

        @contextmanager
        def in_half(pipe, settings):
            with accelerated(pipe, settings) as accelerator:
                accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", **options), True
                self.scalers.append(accelerator.scaler)
                yield accelerator

        monkeypatch.setattr("fusion.training.loop.accelerated", in_half)


def test_steps_that_the_scaler_skips_do_not_count(pictures, monkeypatch):
    half, batches, batch = Half(monkeypatch, init_scale=2.0**40, backoff_factor=2.0**-8), [], TrainingData.batch
    monkeypatch.setattr(TrainingData, "batch", lambda data, k, *more: batches.append(k) or batch(data, k, *more))
    settings = config(pictures, mixed_precision="fp16", checkpointing_steps=3)
    steps, trained = run(toy(), settings)
    skipped, scale = len(batches) - 3, half.scalers[0].get_scale()
    assert skipped > 0 and scale == 2.0 ** (40 - 8 * skipped)
    assert batches == [0] * skipped + [0, 1, 2]  # repeated, not left out
    assert [step.step for step in steps] == [1, 2, 3]
    moments = load_file(steps[-1].checkpoint / "state.safetensors")
    assert {float(value) for name, value in moments.items() if name.endswith(".step")} == {3.0}
    Half(monkeypatch, init_scale=scale)  # where nothing is skipped, all is the same
    others, unskipped = run(toy(), settings)
    assert len(batches) - skipped == 6 and same(trained, unskipped)
    assert [(s.loss, s.learning_rate) for s in others] == [(s.loss, s.learning_rate) for s in steps]


def test_gradients_that_always_overflow_are_an_error(pictures, monkeypatch):
    def infinite(*args, **options):
        loss = denoising_loss(*args, **options)
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    Half(monkeypatch, init_scale=2.0**-12)
    monkeypatch.setattr("fusion.training.step.denoising_loss", infinite)
    with pytest.raises(FusionError, match="overflow"):
        next(fusion.train(toy(), config(pictures, mixed_precision="fp16")))


def test_resuming_in_half_precision_is_exact_with_the_scaler(pictures, monkeypatch):
    half = Half(monkeypatch, init_scale=2.0**40, backoff_factor=2.0**-8, growth_interval=2)
    settings = config(pictures, mixed_precision="fp16", max_train_steps=5, checkpointing_steps=3)
    steps, whole = run(toy(), settings)
    again, resumed = run(toy(), resume(settings, steps[2].checkpoint))
    assert [step.step for step in again] == [4, 5] and same(whole, resumed)
    assert half.scalers[0].state_dict() == half.scalers[1].state_dict()
    assert half.scalers[0].get_scale() < 2.0**39


def test_a_resumed_training_encodes_no_picture_again_with_the_same_autoencoder(pictures, monkeypatch):
    settings, _ = interrupted(pictures, max_train_steps=4, num_validation_images=0)
    whole = run(toy(), settings.updated({"output_dir": pictures.parent / "whole"}))[1]
    phases, encode = list[str](), TrainingData._encode
    monkeypatch.setattr(TrainingData, "_encode", lambda *args: phases.append("encode") or encode(*args))
    *_, last = fusion.train(toy(), resume(settings, "checkpoint-2"), on_progress=lambda name, *_: phases.append(name))
    assert same(whole, parameters(last)) and not {"encode", "encoding pictures"} & {*phases}
    other = tiny.pipeline("sd1")
    with torch.no_grad():
        other.vae.encoder.conv_in.weight += 0.1
    next(fusion.train(other, resume(settings, "checkpoint-2"), on_progress=lambda name, *_: phases.append(name)))
    assert phases.count("encode") == 3
    (file,) = (settings.output_dir / "checkpoints/dog").glob("*/latents.safetensors")
    file.write_bytes(b"damaged")
    next(fusion.train(toy(), resume(settings, "checkpoint-2")))
    assert phases.count("encode") == 6
