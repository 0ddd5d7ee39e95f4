"""A base in one file is its diffusers folder, bit for bit; its contents say what it is and what it predicts."""

import hashlib
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import single_files
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import fusion
import tiny
from fusion.base_models.clip_tokenizer import make_clip_tokenizer
from fusion.base_models.single_file import _FAMILIES as FAMILY_KEYS
from fusion.base_models.single_file import configs_of, read_single_file
from fusion.cli import main
from fusion.errors import BaseMismatch, ConfigError, FormatError
from fusion.models.layer_sites import sites
from fusion.models.stored_weights import StoredWeights, stored_dtype
from fusion_studio.session import Session
from trained import attached, draw, trained_adapter

HALVES = (torch.float16, torch.bfloat16)
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def both(request, tmp_path_factory):
    """A toy base as a folder and as a file."""
    folder, pipe = tmp_path_factory.mktemp(request.param), tiny.pipeline(request.param)
    pipe.save_pretrained(folder / "base")
    single_files.save(pipe, folder / "my-base.safetensors")
    return folder / "base", folder / "my-base.safetensors"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    folder, pipe = tmp_path_factory.mktemp("bases"), tiny.pipeline("sd1")
    pipe.save_pretrained(folder / "base")
    single_files.save(pipe, folder / "my-base.safetensors")
    return folder


def pixels(source, **options):
    pipe = source if hasattr(source, "unet") else fusion.open_pipeline(source, device="cpu", **options)
    config = fusion.GenerationConfig(prompt="a dog in the snow", num_inference_steps=2)
    return np.asarray(fusion.generate(pipe, config)[0].image)


def test_a_file_is_its_folder_bit_for_bit(both):
    folder, file = both
    expected = fusion.open_pipeline(folder, device="cpu")
    pipe = fusion.open_pipeline(file, base_config=folder, device="cpu")
    assert type(pipe) is type(expected) and pipe.scheduler.config == expected.scheduler.config
    for name in MODELS:
        if hasattr(expected, name):
            one, two = getattr(expected, name).state_dict(), getattr(pipe, name).state_dict()
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (pixels(pipe) == pixels(expected)).all()
    info, other = fusion.base_info(pipe), fusion.base_info(expected)
    assert info.name == "my-base" and replace(info, name="base") == other and info.is_same(other)


def test_a_base_is_known_by_its_weights_in_every_precision(sd1, tmp_path):
    pipe = fusion.open_pipeline(sd1 / "base", device="cpu")
    half = single_files.save(pipe, tmp_path / "renamed.safetensors", dtype=torch.float16)
    infos = [
        fusion.base_info(fusion.open_pipeline(source, device="cpu", dtype=dtype, **options))
        for source, options in ((sd1 / "base", {}), (half, {"base_config": sd1 / "base"}))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert len({info.digest for info in infos}) == 1 and infos[0].digest and infos[0].is_same(infos[2])
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data
    weight[0, 0] = -weight[0, 0]
    assert not fusion.base_info(pipe).is_same(infos[0])
    assert replace(infos[0], digest="").is_same(replace(infos[0], family="sd1"))  # an earlier version's, by its name


@pytest.mark.slow
def test_a_session_at_the_terminal_on_a_file_is_that_on_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.pipeline("sdxl")
    pipe.save_pretrained("base")
    single_files.save(pipe, tmp_path / "noob.safetensors", "v_pred", "ztsnr")
    (tmp_path / "noob.fusion.toml").write_text("[training]\nrank = 4\nmax_train_steps = 2\n[generation]\nsteps = 2\n")
    (tmp_path / "base/fusion.toml").write_text((tmp_path / "noob.fusion.toml").read_text())
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save("pictures/0.png")
    told = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]
    bases = {"file": ["--base", "noob.safetensors", "--base_config", "base"], "folder": ["--base", "base", *told]}
    for name, base in bases.items():
        words = ["--instance_data_dir", "pictures", "--noun", "dog", "--learning_rate", "0.1", "--output_dir", name]
        for token in ("<dog>", "<cat>"):
            assert main(["train", *words, *base, "--token", token, "--num_validation_images", "0"]) == 0
        shown = capsys.readouterr().out
        assert "<cat> on slice 4-7, 2 steps" in shown
        files = [f"{name}/{stem}.safetensors" for stem in ("dog", "cat", "both")]
        assert main(["fuse", *files[:2], "-o", files[2]]) == 0
        draw = ["generate", files[2], "--prompt", "a <dog> beside a <cat>", *base, "-o", f"{name}.png"]
        assert main(draw) == 0
    shown = capsys.readouterr().out
    assert (
        "--base base --prediction_type v_prediction --rescale_betas_zero_snr true --seed" in shown
    )  # the next command
    one, two = (fusion.load(f"{name}/both.safetensors") for name in bases)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert (np.asarray(Image.open("file.png")) == np.asarray(Image.open("folder.png"))).all()
    # A training on the folder counts the slices that were trained on the file.
    words = ["--instance_data_dir", "pictures", "--token", "<owl>", "--output_dir", "file", *bases["folder"]]
    assert main(["train", *words, "--num_validation_images", "0"]) == 0
    assert "<owl> on slice 8-11" in capsys.readouterr().out


def test_the_studio_draws_on_a_file(sd1, tmp_path):
    session = Session(str(sd1 / "my-base.safetensors"), tmp_path, base_config=str(sd1 / "base"))
    try:
        assert (pixels(session.pipe) == pixels(sd1 / "base")).all()
        assert session.base_flags[2:] == ["--base_config", str(sd1 / "base")]
        assert session.base_path == str(sd1 / "my-base.safetensors")
    finally:
        session.close()


HINTS = [
    ("sd1", (), {}, None, False),
    ("sd1", ("ztsnr",), {"modelspec.prediction_type": "v"}, "v_prediction", True),
    ("sd2", (), {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
    ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", False),
    ("sdxl", (), {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None, False),
    ("sdxl", ("v_pred",), {}, "v_prediction", False),
    ("sdxl", ("v_pred", "ztsnr"), {"modelspec.prediction_type": "epsilon"}, "v_prediction", True),
]


@pytest.mark.parametrize(("family", "keys", "metadata", "prediction", "zero_snr"), HINTS)
def test_a_file_says_in_keys_and_metadata_what_it_predicts(family, keys, metadata, prediction, zero_snr, tmp_path):
    names = {key: of for key, of in FAMILY_KEYS.items() if of == family}
    tensors = {name: torch.zeros(1) for name in (*names, *keys, "first_stage_model.encoder.conv_in.weight")}
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 4, 3, 3)
    save_file(tensors, tmp_path / "m.safetensors", metadata=metadata)
    file = read_single_file(tmp_path / "m.safetensors")
    assert (file.family, file.prediction, file.zero_snr) == (family, prediction, zero_snr)


def test_schedules_follow_the_file_and_can_be_overridden(tmp_path, monkeypatch, caplog):
    """On the packaged schedulers; the sizes of a toy are those of its folder."""

    def opened(family, *keys, metadata=None, **options):
        pipe, folder = tiny.pipeline(family), tmp_path / family
        if not folder.exists():
            pipe.save_pretrained(folder)
            for name in ("scheduler/scheduler_config.json", "model_index.json"):
                (folder / name).write_text((configs_of(family) / name).read_text())
        monkeypatch.setattr("fusion.base_models.single_file.configs_of", lambda _: folder)
        file = single_files.save(pipe, tmp_path / "model.safetensors", *keys, metadata=metadata)
        return fusion.open_pipeline(file, device="cpu", **options)

    def schedule(pipe):
        config = pipe.scheduler.config
        return type(pipe.scheduler).__name__, config.prediction_type, config.get("rescale_betas_zero_snr", False)

    assert schedule(opened("sd1")) == ("PNDMScheduler", "epsilon", False)
    zero_snr = opened("sd1", "ztsnr")
    assert schedule(zero_snr) == ("DDIMScheduler", "epsilon", True)  # PNDM cannot
    assert zero_snr.scheduler.config.timestep_spacing == "trailing" and pixels(zero_snr).any()
    assert schedule(opened("sdxl", "v_pred")) == ("EulerDiscreteScheduler", "v_prediction", False)
    assert not caplog.text
    assert schedule(opened("sd2")) == ("DDIMScheduler", "v_prediction", False)
    assert "does not say what it predicts: taken for SD 2.x at 768 px" in caplog.text and "\n" not in caplog.messages[0]
    small = opened("sd2", metadata={"modelspec.prediction_type": "epsilon"})
    assert schedule(small) == ("DDIMScheduler", "epsilon", False) and small.unet.config.sample_size == 64
    other = opened("sdxl", "v_pred", "ztsnr", prediction_type="epsilon", rescale_betas_zero_snr=False)
    assert schedule(other) == ("EulerDiscreteScheduler", "epsilon", False)


# Of public lists of the checkpoints' tensors (v1-5-pruned-emaonly, v2-1_768-ema-pruned, sd_xl_base_1.0): how many there
# are and the digest of their names and shapes, without schedules, the last block of SD 2.x's text encoder, unused too,
# and copies of weights (model_ema).
PUBLIC = {"sd1": (1131, "6526f487a98afe4c"), "sd2": (1216, "2fa2b27c43a84ef8"), "sdxl": (2515, "3417e4dabcea9327")}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packaged_configs_claim_every_tensor_of_the_published_files(family):
    folder, kinds = configs_of(family), {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        pipe = SimpleNamespace(
            unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            vae=AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        )
        for name, kind in kinds.items():
            if (folder / name).is_dir():
                setattr(pipe, name, kind(CLIPTextConfig.from_pretrained(folder / name)))
    tensors = single_files.tensors_of(pipe)
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]) == PUBLIC[family]
    unet = single_file_utils.convert_ldm_unet_checkpoint(tensors, dict(pipe.unet.config))
    vae = single_file_utils.convert_ldm_vae_checkpoint(tensors, dict(pipe.vae.config))
    for model, converted in ((pipe.unet, unet), (pipe.vae, vae)):
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_the_tokenizer_knows_clips_words():
    """Ids that every user of CLIP has seen, and padding as SD 1.x and OpenCLIP have it."""
    tokenizer = make_clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a dog, cat").input_ids == [49406, 320, 1125, 539, 320, 1929, 267, 2368, 49407]
    assert tokenizer.pad_token_id == 49407 and make_clip_tokenizer("!").pad_token_id == 0
    for text in ("Ünïcode café 日本語", "don't  THE\n1234 ##", "😀 (masterpiece:1.2)"):
        ids, letters = tokenizer(text).input_ids, "".join(text.lower().split())
        assert max(ids[1:-1]) < 49406 and tokenizer.decode(ids[1:-1]).replace(" ", "") == letters


OTHERS = {
    "a LoRA": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
    "a textual-inversion embedding": ["emb_params"],
    "a VAE alone": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a FLUX model": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    "a Stable Diffusion 3 model": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "a Stable Diffusion XL refiner": ["conditioner.embedders.0.model.positional_embedding"],
    "a UNet without the base's text encoder": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a text encoder alone": ["text_model.embeddings.position_embedding.weight"],
    "no Stable Diffusion checkpoint that is known here": ["weight"],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named_as_what_they_are(kind, tmp_path, capsys):
    save_file({name: torch.zeros(2, 2) for name in OTHERS[kind]}, tmp_path / "x.safetensors")
    assert main(["generate", "--prompt", "a dog", "--base", str(tmp_path / "x.safetensors")]) == 1
    line = capsys.readouterr().err
    assert f"x.safetensors' is {kind}" in line and line.count("\n") == 1


def test_bases_that_cannot_be_used_are_refused_in_one_line(sd1, tmp_path):
    pipe = tiny.pipeline("sd1")
    tensors = {name: tensor.contiguous().clone() for name, tensor in single_files.tensors_of(pipe).items()}
    timeless = {k: v for k, v in tensors.items() if "time_embed." not in k}
    out = "model.diffusion_model.out.2.bias"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    wide = torch.cat([tensors[first], tensors[first], tensors[first][:, :1]], dim=1)
    unusable = {
        "takes 9 channels": tensors | {first: wide},
        "a model of EDM noise": tensors | {"edm_mean": torch.zeros(4)},
        "a quantised model": tensors | {first: tensors[first].to(torch.uint8)},
        "a quantised model,": tensors | {"scaled_fp8": torch.zeros(2)},
        "a whole LCM model, .* in one file": tensors
        | {"model.diffusion_model.time_embed.cond_proj.weight": torch.ones(1)},
        "has no VAE; name one with --pretrained_vae": {k: v for k, v in tensors.items() if "first_stage" not in k},
        "lacks 4 weights of the unet, such as time_embedding": timeless,
        r"other sizes than its family: .* is \[5\], not \[4\]": tensors | {out: torch.ones(5)},
        "lacks 1 weights of the text_encoder": {k: v for k, v in tensors.items() if "final_layer_norm.bias" not in k},
    }
    for reason, content in unusable.items():
        save_file(content, tmp_path / "x.safetensors")
        with pytest.raises(BaseMismatch, match=reason):
            fusion.open_pipeline(tmp_path / "x.safetensors", base_config=sd1 / "base", device="cpu")
    with pytest.raises(BaseMismatch, match="lacks 516 weights of the unet"):  # a toy is smaller than its family
        fusion.open_pipeline(sd1 / "my-base.safetensors", device="cpu")
    with pytest.raises(ConfigError, match="base_config is for a base in a single file"):
        fusion.open_pipeline(sd1 / "base", base_config=sd1 / "base", device="cpu")
    fusion.save(trained_adapter(pipe), tmp_path / "rex.safetensors")
    with pytest.raises(BaseMismatch, match="is an adapter of this program"):
        fusion.open_pipeline(tmp_path / "rex.safetensors", device="cpu")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(FormatError, match="a Python pickle"):
        fusion.open_pipeline(tmp_path / "old.ckpt", device="cpu")
    whole = (sd1 / "my-base.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="damaged or cut short"):
        fusion.open_pipeline(tmp_path / "cut.safetensors", device="cpu")


def test_text_encoders_of_another_layout_are_read(sd1, tmp_path):
    """Some programs write SD 1.x without the level text_model."""
    tensors = single_files.tensors_of(tiny.pipeline("sd1"))
    flat = {name.replace(".text_model.", "."): t.contiguous().clone() for name, t in tensors.items()}
    save_file(flat, tmp_path / "flat.safetensors")
    assert read_single_file(tmp_path / "flat.safetensors").family == "sd1"
    assert (pixels(tmp_path / "flat.safetensors", base_config=sd1 / "base") == pixels(sd1 / "base")).all()


def test_another_vae_comes_from_a_folder_or_a_file(sd1, tmp_path):
    other = tiny.pipeline("sd1", seed=1)
    other.save_pretrained(tmp_path / "other")
    names = single_files.vae_tensors(other.vae)
    save_file({name: tensor.contiguous().clone() for name, tensor in names.items()}, tmp_path / "vae.safetensors")
    expected, file = pixels(sd1 / "base"), {"base_config": sd1 / "base"}
    pictures = [
        pixels(source, pretrained_vae_model_name_or_path=vae, **options)
        for source, options in ((sd1 / "base", {}), (sd1 / "my-base.safetensors", file))
        for vae in (tmp_path / "other", tmp_path / "other/vae", tmp_path / "vae.safetensors")
    ]
    assert all((picture == pictures[0]).all() for picture in pictures) and (pictures[0] != expected).any()
    with pytest.raises(BaseMismatch, match="is a LoRA"):
        save_file({"a.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
        pixels(sd1 / "base", pretrained_vae_model_name_or_path=tmp_path / "lora.safetensors")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    deep = AutoencoderKL.from_config({**other.vae.config, **blocks, "block_out_channels": (8, 16, 16)})
    deep.save_pretrained(tmp_path / "deep")
    with pytest.raises(ConfigError, match="4 channels and 4 pixels a cell instead of 4 and 2"):
        fusion.open_pipeline(sd1 / "base", device="cpu", pretrained_vae_model_name_or_path=tmp_path / "deep")


def test_slices_of_a_file_are_those_of_its_folder_in_every_precision(both, tmp_path):
    folder, file = both
    exact = fusion.open_pipeline(folder, device="cpu")
    half = single_files.save(exact, tmp_path / "half.safetensors", dtype=torch.float16)
    opened = {dtype: fusion.open_pipeline(file, base_config=folder, device="cpu", dtype=dtype) for dtype in HALVES}
    opened["half"] = fusion.open_pipeline(half, base_config=folder, device="cpu", dtype=torch.bfloat16)
    assert fusion.open_pipeline(half, base_config=folder, device="cpu", dtype="stored").unet.dtype == torch.float16
    exact.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="200KB")
    (tmp_path / "variant" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert stored_dtype(tmp_path / "variant", "fp16") == stored_dtype(file) == torch.float32
    (tmp_path / "variant" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BaseMismatch, match=r"it holds its UNet as fp16 only: --variant fp16$"):
        fusion.open_pipeline(tmp_path / "variant", device="cpu")
    assert stored_dtype(tmp_path / "variant") is stored_dtype(tmp_path) is None
    for name, pipe in opened.items():
        stored, table = StoredWeights(pipe), sites(exact)
        for layer, site in sites(pipe).items():
            expected = table[layer].module.weight.detach().flatten(1)
            expected = expected.half().float() if name == "half" else expected
            assert torch.equal(stored.matrix(layer, site), expected), layer
        assert not stored.unknown


def test_weights_of_eight_bits_are_read_as_the_numbers_they_stand_for(sd1, tmp_path):
    """Files in float8 without scales, as Forge writes them: opened in a dtype that layers compute in."""
    pipe, eight = tiny.pipeline("sd1"), torch.float8_e4m3fn
    file = single_files.save(pipe, tmp_path / "eight.safetensors", dtype=eight)
    opened = fusion.open_pipeline(file, base_config=sd1 / "base", device="cpu", dtype="stored")
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(pipe, name).state_dict()
        for key, weight in getattr(opened, name).state_dict().items():
            assert torch.equal(weight, expected[key].to(eight).to(weight.dtype)), key
    with attached(opened, trained_adapter(opened)):
        assert draw(opened, "a <rex>").isfinite().all()


PARTS = {
    "brushnet_down_blocks.0.weight": "a BrushNet",
    "down_blocks.0.motion_modules.0.norm.weight": "a motion module of AnimateDiff",
    "lllite_unet_input_blocks_4.weight": "a ControlNet",
    "body.0.block1.weight": "a T2I-Adapter",
    "vision_model.embeddings.class_embedding": "an image encoder",
}


@pytest.mark.parametrize(("key", "kind"), PARTS.items())
def test_further_files_that_are_no_base_are_named(key, kind, tmp_path):
    save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BaseMismatch, match=f"is {kind}, no base"):
        fusion.open_pipeline(tmp_path / "x.safetensors", device="cpu")
