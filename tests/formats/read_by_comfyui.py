"""Run by test_other_programs.py in a process of its own, with a checkout of ComfyUI on the path.

python read_by_comfyui.py FOLDER: FOLDER holds base/ (a diffusers folder of SD 1.x), lora.safetensors, embeddings/ and
prompts.json. ComfyUI's own code tokenises the prompts with the embeddings, patches the weights with the LoRA and
encodes the prompts; what its cross-attention layers make of them goes to read.safetensors, by diffusers' layer names.
"""

import json
import sys
from pathlib import Path

folder, sys.argv = Path(sys.argv[1]), ["comfyui", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def patched(model, key_map, lora):
    """Load the model's patches and apply them to its weights; all keys of the LoRA's part must be known."""
    patches = comfy.lora.load_lora(lora, key_map)
    state = model.state_dict()
    for key, patch in patches.items():
        state[key] = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], state[key].clone(), key)
    model.load_state_dict(state)
    return {stem for stem, key in key_map.items() if key in patches}


def text_encoder(config):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("max_position_embeddings", "eos_token_id", "hidden_act")
    options = {name: config[name] for name in names}
    model = comfy.sd1_clip.SD1ClipModel(
        device="cpu", dtype=torch.float32, model_options={"clip_l_model_config": options}
    )
    start, end = config["bos_token_id"], config["eos_token_id"]
    model.clip_l.special_tokens = {"start": start, "end": end, "pad": end}
    model.clip_l.max_length = config["max_position_embeddings"]
    weights = load_file(folder / "base/text_encoder/model.safetensors")
    weights = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    table = model.clip_l.transformer.state_dict()["text_model.embeddings.token_embedding.weight"].zero_()
    first = weights["text_model.embeddings.token_embedding.weight"]
    table[: len(first)] = first  # ComfyUI's vocabulary has one size
    weights["text_model.embeddings.token_embedding.weight"] = table
    missing, _ = model.clip_l.transformer.load_state_dict(weights, strict=False)
    assert set(missing) <= {"text_projection.weight"}, missing
    return model


def unet(config):
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    depths = {key: [int("CrossAttn" in kind) for kind in config[key]] for key in ("down_block_types", "up_block_types")}
    shape = {
        **{"use_checkpoint": False, "image_size": 32, "out_channels": 4, "in_channels": 4, "legacy": False},
        **{"use_spatial_transformer": True, "use_linear_in_transformer": bool(config["use_linear_projection"])},
        **{"use_temporal_attention": False, "use_temporal_resblock": False, "num_classes": None},
        **{"adm_in_channels": None, "num_heads": 2, "num_head_channels": -1, "transformer_depth_middle": 1},
        "context_dim": config["cross_attention_dim"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [depth for depth in depths["down_block_types"] for _ in range(layers)],
        "transformer_depth_output": [d for d in depths["up_block_types"] for _ in range(layers + 1)][::-1],
    }
    settings = comfy.supported_models.SD15(shape)
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", device=torch.device("cpu"))
    names = comfy.utils.unet_to_diffusers(settings.unet_config)
    weights = load_file(folder / "base/unet/diffusion_pytorch_model.safetensors")
    renamed = {names[name]: tensor for name, tensor in weights.items() if name in names}
    missing, unexpected = model.diffusion_model.load_state_dict(renamed, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model, names


@torch.no_grad()
def main():
    configs = {part: json.loads((folder / f"base/{part}/config.json").read_text()) for part in ("text_encoder", "unet")}
    clip, (model, names) = text_encoder(configs["text_encoder"]), unet(configs["unet"])
    lora = load_file(folder / "lora.safetensors")
    stems = {key.partition(".")[0] for key in lora}
    read = patched(clip, comfy.lora.model_lora_keys_clip(clip, {}), {k: v for k, v in lora.items() if "_te" in k[:7]})
    read |= patched(model, comfy.lora.model_lora_keys_unet(model, {}), {k: v for k, v in lora.items() if "_un" in k})
    tokenizer = comfy.sd1_clip.SDTokenizer(
        tokenizer_path=str(folder / "base/tokenizer"),
        max_length=configs["text_encoder"]["max_position_embeddings"],
        embedding_directory=str(folder / "embeddings"),
        embedding_size=configs["text_encoder"]["hidden_size"],
    )
    results = {}
    for number, prompt in enumerate(json.loads((folder / "prompts.json").read_text())):
        encoded = clip.clip_l.encode_token_weights(tokenizer.tokenize_with_weights(prompt))[0]
        results[f"{number}:prompt"] = encoded
        for name, theirs in names.items():
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
                layer = model.diffusion_model.get_submodule(theirs.removesuffix(".weight"))
                results[f"{number}:{name.removesuffix('.weight')}"] = layer(encoded)
    save_file(
        {name: tensor.contiguous() for name, tensor in results.items()},
        folder / "read.safetensors",
        {"not read": json.dumps(sorted(stems - read))},
    )


main()
