"""Other programs' LoRAs: understood to the last key, or refused with the reason."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fusion.adapters.adapter import BaseInfo
from fusion.errors import FormatError
from fusion.formats.adapter_file import load

PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def put(tmp_path, tensors, **metadata):
    save_file(tensors, tmp_path / "rex.safetensors", metadata)
    return tmp_path / "rex.safetensors"


def factors(rank=2):
    return torch.randn(rank, 6), torch.randn(5, rank)


def test_kohyas_alpha_is_folded_in(tmp_path):
    down, up = factors()
    tensors = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up, f"{STEM}.alpha": torch.tensor(0.5)}
    adapter = load(put(tmp_path, tensors, ss_base_model_version="sd_v2_v", ss_sd_model_name="v2-1.safetensors"))
    torch.testing.assert_close(adapter.deltas()[PATH].dense(), up @ down / 4)
    assert adapter.info.base == BaseInfo("sd2", "v2-1", "v_prediction")


def test_half_precision_alpha_does_not_round_the_factors(tmp_path):
    down, up = (t.half() for t in factors(3))
    tensors = {
        f"{STEM}.lora_down.weight": down,
        f"{STEM}.lora_up.weight": up,
        f"{STEM}.alpha": torch.tensor(1.0).half(),
    }
    got = load(put(tmp_path, tensors)).deltas()[PATH].dense()
    torch.testing.assert_close(got, up.float() @ down.float() / 3)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"unet.r": 2, "unet.lora_alpha": 8}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {}}, 4.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
@pytest.mark.parametrize("endings", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_diffusers_alpha_lives_in_the_metadata(config, scale, endings, tmp_path):
    down, up = factors()
    tensors = {f"{PATH}.{endings[0]}.weight": down, f"{PATH}.{endings[1]}.weight": up}
    adapter = load(put(tmp_path, tensors, lora_adapter_metadata=json.dumps(config)))
    torch.testing.assert_close(adapter.deltas()[PATH].dense(), scale * up @ down)
    assert adapter.info.base is None


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        '{"unet.lora_alpha": "big"}',
        '{"unet.lora_alpha": 1e999}',
        '{"unet.use_dora": true}',
        '{"unet.alpha_pattern": {"attn2.to_k": 1}}',
        '{"unet.alpha_pattern": 3}',
        "[" * 9999,
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(config, tmp_path):
    down, up = factors()
    path = put(tmp_path, {f"{PATH}.lora_A.weight": down, f"{PATH}.lora_B.weight": up}, lora_adapter_metadata=config)
    with pytest.raises(FormatError, match="metadata"):
        load(path)


def test_both_clip_layouts_have_one_name(tmp_path):
    down, up = factors()
    names = []
    for level in ("", "text_model."):
        stem = f"text_encoder.{level}encoder.layers.0.self_attn.q_proj"
        names += load(put(tmp_path, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})).layer_names
    assert names == ["text_encoder.encoder.layers.0.self_attn.q_proj"] * 2


def test_1x1_convolutions_are_matrices(tmp_path):
    down, up = factors()
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{stem}.lora_A.weight": down[..., None, None], f"{stem}.lora_B.weight": up[..., None, None]}
    torch.testing.assert_close(load(put(tmp_path, tensors)).deltas()[stem].dense(), up @ down)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([f"{STEM}.hada_w1_a"], "hada_w1_a.*LoHa"),
        ([f"{STEM}.lokr_w1"], "lokr_w1.*LoKr"),
        ([f"{PATH}.lokr_w1"], "lokr_w1.*LoKr"),
        ([f"{STEM}.dora_scale"], r"no locon: dora_scale has shape \(2,\)"),
        ([f"{PATH}.lora_magnitude_vector"], r"no locon: dora_scale has shape \(2, 1\)"),
        ([f"{STEM}.lora_mid.weight"], r"no locon: mid has shape \(2,\)"),
        ([f"{STEM}.diff"], "to_k.diff"),
        (["transformer.single_blocks.0.attn.to_q.lora_A.weight"], "1 of its 3 keys are not those of a plain LoRA"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"], "1 of its 3 keys are not those of a plain LoRA"),
        (["lora_unet_single_blocks_0_linear1.alpha"], "not those of a plain LoRA"),
        (["unet.mid_block.attentions.0.nonsense.lora_A.weight"], "nonsense"),
        (["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"], "lack a factor"),
        ([f"{PATH}.lora.down.weight"], "1 of its 3 keys"),
        (["extra"], "extra"),
    ],
)
def test_what_is_no_plain_lora_of_stable_diffusion(keys, reason, tmp_path):
    down, up = factors()
    lora = {f"{PATH}.lora_A.weight": down, f"{PATH}.lora_B.weight": up}
    if any("lora_unet" in key for key in keys):
        lora = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up}
    with pytest.raises(FormatError, match=reason):
        load(put(tmp_path, lora | {key: torch.zeros(2) for key in keys}))


def test_factors_that_make_no_product(tmp_path):
    for down, up in [
        (torch.zeros(2, 6), torch.zeros(5, 3)),
        (torch.zeros(6), torch.zeros(5)),
        (torch.zeros(2, 6, 1, 1), torch.zeros(5, 2)),
    ]:
        with pytest.raises(FormatError, match="have shapes"):
            load(put(tmp_path, {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up}))


@pytest.mark.parametrize(("layer", "size"), [("resnets_0_conv1", 5), ("resnets_0_conv_shortcut", 3)])
def test_kernels_that_the_layer_does_not_have_are_refused(layer, size, tmp_path):
    tensors = {
        f"lora_unet_down_blocks_0_{layer}.lora_down.weight": torch.zeros(2, 4, size, size),
        f"lora_unet_down_blocks_0_{layer}.lora_up.weight": torch.zeros(8, 2, 1, 1),
    }
    with pytest.raises(FormatError, match=r"resnets.0.conv"):
        load(put(tmp_path, tensors))


@pytest.mark.parametrize(
    ("tensors", "guess"),
    [
        ({"<rex>": torch.zeros(1, 8)}, "textual inversion"),
        ({"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(1, 8)}, "textual inversion"),
        (
            {"model.diffusion_model.out.2.weight": torch.zeros(2), "position_ids": torch.arange(2)},
            r"is a whole model and no adapter; give it as the base \(--base\)",
        ),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "2 tensors such as a, b"),
    ],
)
def test_what_holds_no_adapter(tensors, guess, tmp_path):
    with pytest.raises(FormatError, match=guess):
        load(put(tmp_path, tensors))
