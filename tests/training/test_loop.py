"""Training, on toy pipelines of the real classes: what changes, what does not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from toy_training import config, run, same

import fusion
import tiny
from fusion.adapters import ADAPTERS
from fusion.errors import FusionError, SliceConflict, UnknownName
from fusion.models import layer_sites
from fusion.training import setup
from fusion.training.loss import denoising_loss
from fusion.training.setup import named_parameters
from fusion.training.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("own_cache", "few_steps")


def bits(pipe):
    parts = (pipe.unet, pipe.text_encoder, pipe.vae, getattr(pipe, "text_encoder_2", None))
    return {f"{i}.{k}": v.clone() for i, part in enumerate(parts) if part for k, v in part.state_dict().items()}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("gating", ["tokens", "none"])
def test_only_adapter_and_token_rows_change(kind, gating, pictures):
    pipe = tiny.pipeline("sd1")
    before, flags = bits(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    tokenizer = pipe.tokenizer
    steps, trained = run(pipe, config(pictures, adapter_type=kind, gating=gating))
    assert same(before, bits(pipe))
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert pipe.tokenizer is tokenizer
    assert [step.step for step in steps] == [1, 2, 3]
    assert any(delta.norm() > 0 for delta in steps[-1].adapter.deltas().values())
    assert steps[-1].adapter.gated == (gating == "tokens")
    assert trained.keys() == named_parameters(steps[-1].adapter).keys()


def test_every_family_trains_by_its_own_prediction(pipe, family, pictures):
    steps, _ = run(pipe, config(pictures))
    info = steps[-1].adapter.info
    assert info.base.family == family
    assert info.base.prediction == pipe.scheduler.config.prediction_type
    components = {"text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert set(steps[-1].adapter.tokens["<dog>"]) == components
    assert {name.split(".")[0] for name in steps[-1].adapter.layers} == {"unet", *components}


def test_loss_falls_on_one_picture(pictures):
    for extra in ("1.png", "2.png"):
        (pictures / extra).unlink()
    pipe = tiny.pipeline("sd1")
    # The same noise every time, so that only learning can lower the loss: one long batch, two passes over its seeds.
    steps, _ = run(
        pipe, config(pictures, gating="none", max_train_steps=40, train_batch_size=8, lr_scheduler="constant")
    )
    losses = [step.loss for step in steps]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_a_step_changes_only_its_own_embedding_row(pictures):
    pipe = tiny.pipeline("sd1")
    table = pipe.text_encoder.get_input_embeddings().weight.clone()
    steps, trained = run(pipe, config(pictures, num_vectors=2))
    assert torch.equal(table, pipe.text_encoder.get_input_embeddings().weight)
    assert steps[-1].adapter.tokens["<dog>"]["text_encoder"].shape[0] == 2
    assert trained["text_encoder.token.<dog>"].shape == (2, table.shape[1])


def test_stopping_early_leaves_the_pipeline_as_found(pictures):
    pipe = tiny.pipeline("sd1")
    before, tokenizer, modules = bits(pipe), pipe.tokenizer, dict(pipe.unet.named_modules())
    training = fusion.train(pipe, config(pictures, gradient_checkpointing=True))
    next(training)
    assert pipe.tokenizer is not tokenizer
    training.close()
    assert pipe.tokenizer is tokenizer
    assert same(before, bits(pipe))
    after = dict(pipe.unet.named_modules())
    assert after.keys() == modules.keys() and all(after[k] is modules[k] for k in after)
    assert not pipe.unet.is_gradient_checkpointing
    assert not list((pictures.parent / "out").glob(".*.reserved"))


def test_an_error_in_the_middle_leaves_the_pipeline_as_found(pictures):
    pipe = tiny.pipeline("sd1")
    before, tokenizer = bits(pipe), pipe.tokenizer
    with pytest.raises(FusionError, match="loss is"):
        list(fusion.train(pipe, config(pictures, learning_rate=1e6, max_train_steps=30, max_grad_norm=0.0)))
    assert pipe.tokenizer is tokenizer and same(before, bits(pipe))


def test_layers_are_walked_once_until_the_first_step(pipe, pictures, monkeypatch):
    walked, walk = [], layer_sites.walk
    monkeypatch.setattr(layer_sites, "walk", lambda component, root: walked.append(component) or walk(component, root))
    settings = config(pictures, quiet_loss_weight=1.0, balance_slices=True, validation_prompt="a {token}")
    training = fusion.train(pipe, settings)
    assert next(training).step == 1
    assert walked == [*layer_sites.components(pipe)]
    training.close()


def test_an_untrained_adapter_is_made_without_a_trace(pictures):
    pipe, settings = tiny.pipeline("sd1"), config(pictures)
    targets = setup.target_sites(pipe, settings)
    one, two = (setup.fresh_adapter(pipe, settings, targets, fusion.SpectralSlice(4, 4)) for _ in range(2))
    assert one.digest() == two.digest() and one.slices == (fusion.SpectralSlice(4, 4),)
    assert not settings.output_dir.exists()  # nothing was reserved or written
    with setup.reserved_slice(pipe, settings, targets) as directions:
        assert directions == fusion.SpectralSlice(0, 4) and list(settings.output_dir.glob(".*.reserved"))
    assert not list(settings.output_dir.glob(".*.reserved"))


def test_equal_seeds_give_equal_adapters_and_others_do_not(pictures):
    _, first = run(tiny.pipeline("sd1"), config(pictures))
    _, again = run(tiny.pipeline("sd1"), config(pictures))
    _, other = run(tiny.pipeline("sd1"), config(pictures, seed=1))
    assert same(first, again) and not same(first, other)


def test_masks_change_the_loss_and_only_inside_counts(pictures):
    white = Image.new("L", (48, 40), 0)
    white.paste(255, (0, 0, 24, 40))
    for i in range(3):
        white.save(pictures / "masks" / f"{i}.png")
    masked, _ = run(tiny.pipeline("sd1"), config(pictures, unmasked_weight=0.0))
    plain, _ = run(tiny.pipeline("sd1"), config(pictures, use_masks=False))
    assert masked[0].loss != plain[0].loss
    prediction, target = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    disturbed = prediction + 100 * (1 - mask)
    assert denoising_loss(prediction, target, mask=mask) == denoising_loss(disturbed, target, mask=mask)


@pytest.mark.parametrize(
    "setting", [{"snr_gamma": 5.0}, {"noise_offset": 0.5}, {"prediction_type": "v_prediction"}, {"seed": 7}]
)
def test_each_setting_of_the_objective_changes_the_loss(setting, pictures):
    plain, _ = run(tiny.pipeline("sd1"), config(pictures, max_train_steps=1))
    changed, _ = run(tiny.pipeline("sd1"), config(pictures, max_train_steps=1, **setting))
    assert plain[0].loss != changed[0].loss


def test_gradient_checkpointing_changes_no_result(pictures):
    _, plain = run(tiny.pipeline("sdxl"), config(pictures))
    _, checkpointed = run(tiny.pipeline("sdxl"), config(pictures, gradient_checkpointing=True))
    assert all(torch.allclose(plain[k], checkpointed[k], atol=1e-6) for k in plain)


def test_autocast_in_bfloat16_trains_float32_adapters(pictures):
    steps, trained = run(tiny.pipeline("sd1"), config(pictures, mixed_precision="bf16"))
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert np.isfinite([step.loss for step in steps]).all()


def test_text_is_encoded_once_where_nothing_upstream_trains(pictures, monkeypatch):
    pipe = tiny.pipeline("sd1")
    calls = []
    encode = type(pipe).encode_prompt
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *a, **k: calls.append(1) or encode(*a, **k))
    run(pipe, config(pictures, token_lr=0.0, text_encoder_lr=0.0, max_train_steps=5))
    assert len(calls) == 1  # three pictures, one caption


def test_prior_preservation_draws_what_is_missing_and_says_what_gating_makes_of_it(pictures, caplog, monkeypatch):
    monkeypatch.setattr("fusion.formats.picture_file.MIN_SIDE", 8)  # the toy base draws 16 px
    settings = config(
        pictures,
        with_prior_preservation=True,
        class_prompt="a dog",
        num_class_images=4,
        sample_batch_size=2,
        num_validation_images=0,
    )
    run(tiny.pipeline("sd1"), settings)
    assert not settings.class_folder().exists()
    assert "with_prior_preservation does nothing with gating = 'tokens'" in caplog.text
    phases = list[tuple[str, int, int]]()
    ungated = list(
        fusion.train(
            tiny.pipeline("sd1"), settings.updated({"gating": "none"}), on_progress=lambda *p: phases.append(p)
        )
    )
    assert [p for p in phases if "class" in p[0]] == [("drawing class pictures", n, 4) for n in (0, 2)]
    files = {path.name: path.read_bytes() for path in settings.class_folder().glob("*.png")}
    assert sorted(files) == [f"drawn-0000{i}.png" for i in range(4)]
    for name in ("drawn-00001.png", "drawn-00003.png"):  # only what is missing is drawn again, and alike
        (settings.class_folder() / name).unlink()
    phases.clear()
    next(
        fusion.train(
            tiny.pipeline("sd1"), settings.updated({"gating": "none"}), on_progress=lambda *p: phases.append(p)
        )
    )
    assert [p for p in phases if "class" in p[0]] == [("drawing class pictures", n, 2) for n in (0, 1)]
    again = {path.name: path for path in settings.class_folder().glob("*.png")}
    assert {name: np.asarray(Image.open(path)).tolist() for name, path in again.items()} == {
        name: np.asarray(Image.open(io.BytesIO(data))).tolist() for name, data in files.items()
    }
    without, _ = run(tiny.pipeline("sd1"), config(pictures, gating="none"))
    assert ungated[0].loss > without[0].loss


def test_previews_are_drawn_by_the_code_that_draws_all_pictures(pictures):
    pipe = tiny.pipeline("sd1")
    settings = config(pictures, validation_prompt="a {token}", num_validation_images=2, validation_steps=2)
    steps, _ = run(pipe, settings)
    assert [len(step.images) for step in steps] == [0, 2, 2]
    again = fusion.generate(pipe, fusion.GenerationConfig(prompt="a <dog>", num_images=2), [steps[-1].adapter])
    assert all(np.array_equal(p.image, q) for p, q in zip(again, steps[-1].images, strict=True))


def test_an_interrupted_last_preview_does_not_lose_the_adapter(pictures, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusion.training.loop.generate", interrupted)
    pipe, settings = tiny.pipeline("sd1"), config(pictures, validation_prompt="a {token}")
    *_, last = fusion.train(pipe, settings)
    assert last.step == last.total and last.images == []
    with pytest.raises(KeyboardInterrupt):
        list(fusion.train(pipe, settings.updated({"validation_steps": 1})))


def test_slices_are_handed_out_by_the_output_folder(pictures):
    pipe, slices = tiny.pipeline("sd1"), []
    for token in ("<dog>", "<cat>"):
        settings = config(pictures, token=token, instance_prompt="a {token}")
        steps, _ = run(pipe, settings)
        fusion.save(steps[-1].adapter, settings.output_dir / f"{settings.name}.safetensors")
        slices.append(steps[-1].adapter.slices[0])
    assert slices == [fusion.SpectralSlice.contiguous(0, 4), fusion.SpectralSlice.contiguous(1, 4)]
    with pytest.raises(SliceConflict, match="dog"):
        next(fusion.train(pipe, config(pictures, token="<owl>", slice=0)))


def test_a_slice_beyond_the_narrowest_layer_is_refused_by_its_name(pictures):
    with pytest.raises(SliceConflict, match=r"text_encoder|unet"):
        next(fusion.train(tiny.pipeline("sd1"), config(pictures, slice=1000)))


def test_unknown_targets_are_refused_with_a_suggestion(pictures):
    with pytest.raises(UnknownName, match=r"unet\.attn2"):
        next(fusion.train(tiny.pipeline("sd1"), config(pictures, targets=["unet.atn2"])))


def test_targets_that_see_no_tokens_are_said(pictures, caplog):
    run(tiny.pipeline("sd1"), config(pictures, targets=["unet.attn1"], max_train_steps=1))
    assert "see no tokens" in caplog.text


def test_balanced_slices_learn_at_their_own_rate(pictures):
    weak = config(pictures, slice=5, balance_slices=True, max_train_steps=1)
    _, balanced = run(tiny.pipeline("sd1"), weak)
    _, plain = run(tiny.pipeline("sd1"), weak.updated({"balance_slices": False}))
    name = next(n for n in plain if n.endswith("dU") and n.startswith("unet"))
    assert balanced[name].abs().mean() > 1.05 * plain[name].abs().mean()


def test_batches_are_a_function_of_their_number(pictures):
    pipe, settings = tiny.pipeline("sd1"), config(pictures)
    batches = TrainingData(pipe, settings)
    batches.prepare()
    generator = torch.Generator
    one = batches.batch(4, generator().manual_seed(0))
    assert torch.equal(one.latents, batches.batch(4, generator().manual_seed(0)).latents)
    assert len(one.captions) == settings.train_batch_size
