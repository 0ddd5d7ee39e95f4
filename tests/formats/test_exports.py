"""Exports: exact, named as other programs expect, and drawing the same pictures in diffusers' own hands."""

import base64
import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import tiny
from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, BaseInfo, Provenance
from fusion.errors import ConfigError, FormatError, UnknownName
from fusion.formats import EXPORT_FORMS, kohya_lora
from fusion.formats.adapter_file import load
from fusion.formats.lora_export import export
from fusion.formats.lora_file import balanced
from fusion.models.attachment import attach
from fusion.spectral.delta import Delta


def published(pipe):
    """SDXL with as many layers per block as the published one, which is what its first block names count."""
    if hasattr(pipe, "text_encoder_2"):
        config = dict(pipe.unet.config) | {"layers_per_block": 2}
        pipe.register_modules(unet=type(pipe.unet).from_config(config).eval())
    return pipe


def draw(pipe, prompt):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="np").images
    )


def error(adapter, again):
    """Largest relative difference of ΔW over all layers; the names must be the same."""
    deltas, got = adapter.deltas(), again.deltas()
    assert deltas.keys() == got.keys()
    return max(float((got[n].dense() - d.dense()).norm() / d.norm()) for n, d in deltas.items())


def load_in_diffusers(pipe, report, adapter):
    """What the notes of an export tell the user of diffusers to do."""
    pipe.load_lora_weights(str(report.path))
    for concept, file in zip(adapter.info.concepts, report.files[1:], strict=True):
        if hasattr(pipe, "text_encoder_2"):
            rows = load_file(file)
            pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
            pipe.load_textual_inversion({concept.token: rows["clip_l"]})
            second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
            pipe.load_textual_inversion({concept.token: rows["clip_g"]}, **second)
        else:
            pipe.load_textual_inversion(str(file))


@pytest.mark.parametrize("form", EXPORT_FORMS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_is_exported_is_imported(kind, form, trained, tmp_path):
    adapter = trained(tiny.pipeline("sd1"), kind)
    report = export(adapter, tmp_path / "rex.safetensors", form, dtype="float32")
    again = load(report.path)
    assert report.exact and report.energy == 1 and report.rank == adapter.rank
    assert error(adapter, again) < 1e-6
    assert (again.branches[0].type, again.gated, again.info.name) == ("lora", False, "rex")
    assert error(again, load(export(again, tmp_path / "again.safetensors", form, dtype="float32").path)) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_diffusers_draws_the_same_pictures(form, dtype, pipe, trained, side_by_side, wide, tmp_path):
    """Law 11: several concepts, layers of different ranks, every kind of layer, a token of two vectors."""
    pipe = published(pipe)
    targets = [*wide(pipe), "unet.time_emb_proj", "unet.time_embedding", "unet.conv_shortcut"]
    fused = side_by_side(
        trained(pipe, "additive", targets=targets, vectors=2, scale=0.05),
        trained(pipe, "rotational", k=1, token="<tom>", noun="cat", targets=["unet.attn2.to_k"], scale=0.3),
        strengths=[1.0, 0.5],
    )
    prompt = "a photo of <rex> and <tom>"
    before = draw(pipe, "a photo of a dog and a cat")
    with attach(pipe, fused, gating="none"):
        ours = draw(pipe, prompt)
    report = export(fused, tmp_path / "both.safetensors", form, dtype=dtype)
    assert error(fused, load(report.path)) < (1e-6 if dtype == "float32" else 1e-3)
    load_in_diffusers(pipe, report, fused)
    theirs = draw(pipe, prompt)
    assert (ours - theirs).abs().max() < (1e-5 if dtype == "float32" else 1e-3)
    assert (ours - before).abs().max() > 0.02, "the adapters should be seen"


def test_keys_and_metadata_of_a_diffusers_file(trained, tmp_path):
    adapter = trained(tiny.pipeline("sd1"), targets=["unet.proj_in", "text_encoder"])
    export(adapter, tmp_path / "rex.safetensors", "diffusers")
    with safe_open(tmp_path / "rex.safetensors", "pt") as file:
        metadata = file.metadata()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes["unet.mid_block.attentions.0.proj_in.lora_A.weight"] == (8, 64, 1, 1)
    assert shapes["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] == (32, 8)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["format"] == "pt"


KOHYA = {
    "sd1": [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ],
    "sdxl": [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_output_blocks_2_1_transformer_blocks_1_ff_net_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1",
    ],
}


@pytest.mark.parametrize("family", KOHYA)
def test_keys_and_metadata_of_a_kohya_file(family, trained, side_by_side, wide, tmp_path):
    pipe = published(tiny.pipeline(family))
    fused = side_by_side(
        trained(pipe, targets=wide(pipe)), trained(pipe, k=1, token="<tom>", noun="cat", targets=["unet.attn2"])
    )
    export(fused, tmp_path / "both.safetensors", "kohya", dtype="float32")
    tensors = load_file(tmp_path / "both.safetensors")
    for stem in KOHYA[family]:
        assert {f"{stem}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= tensors.keys()
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {16.0}
    with safe_open(tmp_path / "both.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {"sd1": ("sd_v1", "stable-diffusion-v1"), "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")}
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"]) == (
        expected[family][0],
        f"{expected[family][1]}/lora",
    )
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", "16")
    assert metadata["modelspec.trigger_phrase"] == "<rex>, <tom>" and metadata["modelspec.merged_from"] == "dog, cat"


def kohya_hash(file):
    """`sshs_model_hash` by kohya's rule: of the tensors saved anew with the ss_ entries alone, behind the header."""
    with safe_open(file, "pt") as opened:
        entries = {key: value for key, value in opened.metadata().items() if key.startswith("ss_")}
    data = safetensors.torch.save(load_file(file), entries)
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_managers_of_models_read(dtype, trained, side_by_side, tmp_path):
    """Words by A1111's rule, the hash by kohya's, a picture as A1111, ComfyUI and SwarmUI find it."""
    pipe = tiny.pipeline("sd1")
    both = side_by_side(trained(pipe), trained(pipe, k=1, token="<tom>", noun="cat"))
    picture = Image.new("RGB", (512, 300), (10, 200, 30))
    for form, words in {"kohya": ["x_rex", "x_tom"], "diffusers": ["<rex>", "<tom>"]}.items():
        report = export(both, tmp_path / "x.safetensors", form, dtype=dtype, picture=picture, overwrite=True)
        with safe_open(report.path, "pt") as file:
            metadata = file.metadata()
        tags = json.loads(metadata["ss_tag_frequency"])
        assert [tag for folder in tags.values() for tag in folder] == words
        if form == "kohya":
            assert words == [path.stem for path in report.files[1:]]
        assert metadata["modelspec.trigger_phrase"] == "<rex>, <tom>"
        assert metadata["sshs_model_hash"] == kohya_hash(report.path)
        assert metadata["modelspec.hash_sha256"] == f"0x{kohya_hash(report.path)}"
        (cover,) = json.loads(metadata["ssmd_cover_images"])
        assert metadata["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
        image = Image.open(io.BytesIO(base64.b64decode(cover)))
        assert image.size == (256, 150) and abs(np.asarray(image).mean((0, 1)) - (10, 200, 30)).max() < 3
    plain = export(both, tmp_path / "y.safetensors", "kohya")
    with safe_open(plain.path, "pt") as file:
        assert "modelspec.thumbnail" not in file.metadata()


@pytest.mark.parametrize(
    ("first", "ours"),
    [
        ("input_blocks_1_0_emb_layers_1", "down_blocks.0.resnets.0.time_emb_proj"),
        (
            "input_blocks_8_1_transformer_blocks_9_attn1_to_q",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q",
        ),
        ("middle_block_2_skip_connection", "mid_block.resnets.1.conv_shortcut"),
        ("output_blocks_0_1_proj_in", "up_blocks.0.attentions.0.proj_in"),
        ("output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
        ("down_blocks_1_attentions_0_proj_out", "down_blocks.1.attentions.0.proj_out"),
    ],
)
def test_both_spellings_of_sdxl_are_read(first, ours):
    assert kohya_lora.layer_name(f"lora_unet_{first}") == f"unet.{ours}"
    if not first.startswith("down"):
        assert kohya_lora.key_stem(f"unet.{ours}", "sdxl") == f"lora_unet_{first}"


def test_a_layer_that_sdxl_does_not_have_is_refused():
    with pytest.raises(FormatError, match="export as 'diffusers'"):
        kohya_lora.key_stem("unet.down_blocks.1.attentions.2.proj_in", "sdxl")


def test_compression_says_what_it_cost(trained, tmp_path):
    adapter = trained(tiny.pipeline("sd1"), "additive", scale=0.02)
    report = export(adapter, tmp_path / "small.safetensors", "kohya", rank=3, dtype="float32")
    assert (report.exact, report.rank) == (False, 3) and 0.3 < report.energy < 1
    lost = sum(
        float((load(report.path).deltas()[n].dense() - d.dense()).square().sum()) for n, d in adapter.deltas().items()
    )
    total = sum(float(d.inner(d)) for d in adapter.deltas().values())
    assert report.energy == pytest.approx(1 - lost / total, abs=1e-4)
    assert f"rank 3; {report.energy:.2%}" in report.notes[0]
    assert export(adapter, tmp_path / "most.safetensors", "diffusers", energy=0.9).energy >= 0.9
    assert export(adapter, tmp_path / "all.safetensors", "diffusers", rank=64).exact


def test_the_user_is_told_what_a_lora_cannot_do(trained, side_by_side, tmp_path):
    pipe = tiny.pipeline("sd1")
    gated = side_by_side(trained(pipe), trained(pipe, k=1, token="<tom>", noun="cat"))
    report = export(gated, tmp_path / "both.safetensors", "kohya")
    said = "\n".join(report.notes)
    assert "cannot be gated" in said and "<rex>, <tom>" in said and "load_textual_inversion" in said
    names = ["both.safetensors", "both_rex.safetensors", "both_tom.safetensors"]
    assert report.files == [tmp_path / name for name in names] and all(file.exists() for file in report.files)
    assert "quiet_loss_weight = 10" in said
    quiet = replace(gated, info=replace(gated.info, provenance=Provenance(settings={"quiet_loss_weight": 3.0})))
    assert "quiet_loss" not in "\n".join(export(quiet, tmp_path / "both.safetensors", "kohya").notes)
    assert "gated" not in "\n".join(export(trained(pipe, gated=False), tmp_path / "x.safetensors", "kohya").notes)


def test_an_sdxl_embedding_has_a_part_for_each_encoder(trained, tmp_path):
    adapter = trained(tiny.pipeline("sdxl"), vectors=2)
    report = export(adapter, tmp_path / "rex.safetensors", "diffusers")
    rows = load_file(report.files[1])
    assert {key: tuple(row.shape) for key, row in rows.items()} == {"clip_l": (2, 32), "clip_g": (2, 40)}


def test_senseless_wishes_are_refused(trained, tmp_path):
    adapter, path = trained(tiny.pipeline("sd1")), tmp_path / "rex.safetensors"
    for options, kind in [
        ({"form": "diffuser"}, UnknownName),
        ({"rank": 0}, ConfigError),
        ({"energy": 1.5}, ConfigError),
        ({"dtype": "int8"}, ConfigError),
    ]:
        with pytest.raises(kind):
            export(adapter, path, **({"form": "diffusers"} | options))
    with pytest.raises(FormatError, match="changes no layer"):
        export(Adapter(adapter.info, (), adapter.tokens), path, "diffusers")
    assert not list(tmp_path.iterdir())


def test_balancing_changes_no_bit_of_the_product():
    """Scaling by powers of two commutes with every rounding of the product."""
    delta = Delta(torch.randn(24, 6) * 1e-6, torch.randn(6, 16) * 300)
    delta.up[:, 2] = 0
    even = balanced(delta)
    assert torch.equal(even.dense(), delta.dense())
    lengths = torch.linalg.vector_norm(even.up, dim=0) / torch.linalg.vector_norm(even.down, dim=1)
    assert ((lengths > 0.5) & (lengths < 2) | (lengths == 0)).all()


def test_the_base_survives_the_journey(trained, tmp_path):
    for family, prediction in [("sd1", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")]:
        for form in EXPORT_FORMS:
            adapter = trained(published(tiny.pipeline(family)), targets=["unet.attn2.to_k"])
            again = load(export(adapter, tmp_path / "rex.safetensors", form).path)
            assert again.info.base == BaseInfo(family, adapter.info.base.name, prediction)
