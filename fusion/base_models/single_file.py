"""Base models in one .safetensors file, in the layout of A1111, ComfyUI and the original code (LDM and SGM).

What a file is follows from the names and shapes of its tensors and from its ModelSpec entries, never from its name.
diffusers converts the weights, with the packaged configs of the family or those of a folder; nothing is downloaded.
"""

import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fusion.base_models.clip_tokenizer import make_clip_tokenizer
from fusion.errors import BaseMismatch
from fusion.formats.adapter_file import FORMAT
from fusion.formats.safetensors_file import Header, read_header
from fusion.models.layer_sites import components

CLASSES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # of every UNet
_VAE = ("first_stage_model.", "vae.")
_TEXT = "cond_stage_model.transformer."  # SD 1.x; some programs leave out the level text_model below it
# A family, by a tensor that its files have, and no others.
_FAMILIES = {
    "conditioner.embedders.1.model.positional_embedding": "sdxl",
    "cond_stage_model.model.positional_embedding": "sd2",
    f"{_TEXT}text_model.embeddings.position_embedding.weight": "sd1",
    f"{_TEXT}embeddings.position_embedding.weight": "sd1",
}
_PADS_WITH_ZERO = {("sd2", "tokenizer"), ("sdxl", "tokenizer_2")}  # OpenCLIP's
# Whole models that are none of them, by a pattern that a tensor's name matches.
_UNSUITABLE = {
    r"edm_(mean|vpred)": "a model of EDM noise (Playground 2.5 and its like)",
    r"model\.diffusion_model\.time_embed\.cond_proj": (
        "a whole LCM model, which has the guidance as an input, in one file (its diffusers folder works)"
    ),
    r"scaled_fp8|.*\.(absmax|quant_map|scale_weight|weight_scale)": "a quantised model",
}
# Files that are no whole model; the first that fits.
_PARTS = {
    r".*(lora_(up|down|A|B|mid)\b|lora\.(up|down)\b|hada_w|lokr_w|dora_scale|lora_linear_layer)": (
        "a LoRA, no base: give it as an adapter, and its base with --base"
    ),
    r"(emb_params|string_to_param|clip_[lg]|<.*>)$": "a textual-inversion embedding, no base",
    r"control_model\.|controlnet_|input_hint_block|lllite_": "a ControlNet, no base",
    r"brushnet_": "a BrushNet, no base",
    r".*motion_modules\.": "a motion module of AnimateDiff, no base",
    r"(body|adapter)\.": "a T2I-Adapter, no base",
    r"vision_model\.": "an image encoder, no base",
    r"ip_adapter\.|image_proj\.": "an IP-Adapter, no base",
    r".*(double_blocks|single_transformer_blocks)\.": "a FLUX model",
    r".*joint_blocks\.": "a Stable Diffusion 3 model",
    r"conditioner\.embedders\.0\.model\.": "a Stable Diffusion XL refiner",
    r"(model\.diffusion_model\.)?(input_blocks|down_blocks|conv_in)\.": "a UNet without the base's text encoder",
    r"model\.diffusion_model\.": "a model of another architecture",
    r"(encoder|decoder|quant_conv|first_stage_model)\.": "a VAE alone, no base",
    r"(text_model|cond_stage_model|conditioner|transformer)\.": "a text encoder alone, no base",
}
_WORKS_ON = "spectral-fusion works on Stable Diffusion 1.x, 2.x and XL"


@dataclass(frozen=True)
class SingleFile:
    """What a checkpoint file is, read from its header alone."""

    path: Path
    family: str
    prediction: str | None  # None: the file does not say
    zero_snr: bool  # the last timestep is nothing but noise


def read_single_file(path: Path, *, needs_vae: bool = True) -> SingleFile:
    """Recognise a base in one file.

    Raises BaseMismatch that names what the file is instead, FormatError for one that is no safetensors file.
    """
    header = read_header(path)
    family = next((family for key, family in _FAMILIES.items() if key in header.shapes), None)
    if _FIRST not in header.shapes or family is None:
        kind = _match(_PARTS, header) or "no Stable Diffusion checkpoint that is known here"
        kind = "an adapter of this program, no base" if header.metadata.get("format") == FORMAT else kind
        raise BaseMismatch(f"'{path}' is {kind}; {_WORKS_ON}, in one file with text encoder, UNet and VAE.")
    kind = _match(_UNSUITABLE, header)
    if not header.dtypes[_FIRST].startswith(("F", "BF")):
        kind = "a quantised model"
    channels = (*header.shapes[_FIRST], 0, 0)[1]
    if channels != 4:
        kind = f"a model for inpainting or editing, whose UNet takes {channels} channels"
    if kind:
        raise BaseMismatch(f"'{path}' is {kind}, which cannot be used here; {_WORKS_ON}.")
    if needs_vae and not any(name.startswith(_VAE) for name in header.shapes):
        raise BaseMismatch(f"'{path}' has no VAE; name one with --pretrained_vae_model_name_or_path.")
    return SingleFile(path, family, _prediction(header), "ztsnr" in header.shapes)


def _match(kinds: dict[str, str], header: Header) -> str | None:
    """What the names of the tensors say, the first of `kinds` first."""
    fitting = (kind for pattern, kind in kinds.items() if any(re.match(pattern, name) for name in header.shapes))
    return next(fitting, None)


def _prediction(header: Header) -> str | None:
    """As A1111 and ComfyUI decide: by the tensor `v_pred`; then as ModelSpec says."""
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    architecture = header.metadata.get("modelspec.architecture", "").partition("/")[0]
    if "v_pred" in header.shapes or stated.startswith("v") or architecture.endswith("768-v"):
        return "v_prediction"
    return "epsilon" if stated == "epsilon" or architecture.endswith("v2-512") else None


def load_single_file(file: SingleFile, config: Path | None, dtype: torch.dtype, **parts: object) -> Any:
    """The pipeline of a checkpoint file, on the CPU; `parts` are components that another source has.

    `config` is a diffusers folder whose configs are used instead of the packaged ones. Raises BaseMismatch where
    weights are missing, and what diffusers raises for others that do not fit.
    """
    folder = config or configs_of(file.family)
    for name in ("tokenizer", "tokenizer_2") if file.family == "sdxl" else ("tokenizer",):
        parts[name] = _tokenizer(folder / name, "!" if (file.family, name) in _PADS_WITH_ZERO else "<|endoftext|>")
    names = read_header(file.path).shapes
    if file.family == "sd1" and not any(name.startswith(f"{_TEXT}text_model.") for name in names):
        parts["text_encoder"] = _flat_text_encoder(file.path, folder, dtype)
    kind = getattr(diffusers, CLASSES[file.family])
    try:
        pipe = kind.from_single_file(str(file.path), config=str(folder), dtype=dtype, local_files_only=True, **parts)
    except Exception:
        _check_models(read_header(file.path), file.path, folder, needs_vae="vae" not in parts)
        raise
    for name, module in components(pipe).items():
        _check_weights(file.path, name, [key for key, weight in module.named_parameters() if weight.is_meta])
    pipe.register_to_config(_name_or_path=str(file.path))
    return pipe


def configs_of(family: str) -> Path:
    """The packaged configs of a family, a diffusers folder without weights and tokenizers."""
    return Path(str(files("fusion.base_models") / "configs" / family))


def load_vae(source: str | Path, config: Path, dtype: torch.dtype) -> nn.Module:
    """An autoencoder on the CPU, from a folder, a hub id, or a file with the config that `config`/vae has.

    Raises BaseMismatch for a file of something else, and what diffusers raises for what does not fit.
    """
    if not os.path.isfile(source):  # noqa: PTH113 (Path.is_file raises for long names)
        part = "vae" if os.path.isdir(os.path.join(source, "vae")) else None  # noqa: PTH112, PTH118
        return diffusers.AutoencoderKL.from_pretrained(source, subfolder=part, dtype=dtype, use_safetensors=True)
    header = read_header(source)
    if not any(name.startswith(("decoder.", *_VAE)) for name in header.shapes):
        raise BaseMismatch(f"'{source}' is {_match(_PARTS, header) or 'no VAE'}.")
    kind: Any = diffusers.AutoencoderKL
    return kind.from_single_file(str(source), config=str(config), subfolder="vae", dtype=dtype, local_files_only=True)


def _check_models(header: Header, path: Path, folder: Path, *, needs_vae: bool) -> None:
    """Raise BaseMismatch for weights of the UNet or the VAE that are missing or of other sizes than in the configs."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}
    models: dict[str, tuple[Any, Any]] = {
        "unet": (diffusers.UNet2DConditionModel, single_file_utils.convert_ldm_unet_checkpoint),
        "vae": (diffusers.AutoencoderKL, single_file_utils.convert_ldm_vae_checkpoint),
    }
    for name, (kind, convert) in models.items():
        if name == "unet" or needs_vae:
            with torch.device("meta"):
                expected = kind.from_config(config := kind.load_config(folder / name)).state_dict()
            converted = convert(weights, config)
            _check_weights(path, name, [key for key in expected if key not in converted])
            if other := [key for key, weight in expected.items() if weight.shape != converted[key].shape]:
                sizes = [list(tensors[other[0]].shape) for tensors in (converted, expected)]
                raise BaseMismatch(
                    f"'{path}' has other sizes than its family: {other[0]} of the {name} is {sizes[0]}, not "
                    f"{sizes[1]}. --base_config names a folder of other configs."
                )


def _check_weights(path: Path, name: str, missing: list[str]) -> None:
    if missing:
        raise BaseMismatch(f"'{path}' lacks {len(missing)} weights of the {name}, such as {missing[0]}.")


def _tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True) if folder.is_dir() else make_clip_tokenizer(pad)


def _flat_text_encoder(path: Path, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The text encoder of SD 1.x files without the level `text_model`, which diffusers does not know."""
    with safe_open(path, framework="pt", device="cpu") as file:
        names = [name for name in file.keys() if name.startswith(_TEXT) and not name.endswith("position_ids")]  # noqa: SIM118
        weights = {name.removeprefix(_TEXT): file.get_tensor(name).to(dtype) for name in names}
    encoder: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    encoder = encoder.to(dtype)
    encoder.load_state_dict(weights)
    return encoder.eval()
