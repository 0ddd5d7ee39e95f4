"""Toy pipelines written as one file, in the layout of real checkpoints: LDM's for SD 1.x and 2.x, SGM's for XL.

The inverse of what diffusers does on loading, written from the layout and not from diffusers' tables, so that the two
check each other.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
UNET |= {"mid_block.resnets.1": "middle_block.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPEN_CLIP |= {"self_attn.out_proj": "attn.out_proj"}


def tensors_of(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights under the names of a checkpoint file."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet_tensors(pipe.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_tensors(pipe.vae).items()}
    if hasattr(pipe, "text_encoder_2"):
        tensors |= clip_tensors(pipe.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        tensors |= open_clip_tensors(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.unet.config.use_linear_projection:
        tensors |= open_clip_tensors(pipe.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= clip_tensors(pipe.text_encoder, "cond_stage_model.transformer.text_model.")
    return tensors


def save(
    pipe: DiffusionPipeline, path: Path, *keys: str, metadata: Mapping[str, str] | None = None, dtype=None
) -> Path:
    """Write a pipeline as one file; `keys` are tensors without values, such as v_pred."""
    tensors = {k: v.to(dtype if v.is_floating_point() else None) for k, v in tensors_of(pipe).items()}
    tensors |= {key: torch.tensor([]) for key in keys}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=dict(metadata or {}))
    return path


def unet_tensors(unet) -> dict[str, Tensor]:
    rows = unet.config.layers_per_block + 1
    attends = [name.startswith("CrossAttn") for name in unet.config.up_block_types]

    def block(match: re.Match) -> str:
        """Every resnet, alone or with an attention behind it, and every downsampler is a block of its own."""
        side, number, kind, row = match[1], int(match[2]), match[3], int(match[4])
        if kind in ("resnets", "attentions"):
            start = "input_blocks" if side == "down" else "output_blocks"
            return f"{start}.{number * rows + row + (side == 'down')}.{int(kind == 'attentions')}."
        if kind == "downsamplers":
            return f"input_blocks.{(number + 1) * rows}.0.op."
        return f"output_blocks.{number * rows + rows - 1}.{1 + attends[number]}.conv."

    def renamed(name: str) -> str:
        for old, new in UNET.items():
            if name.startswith(f"{old}."):
                name = new + name.removeprefix(old)
        name = re.sub(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", block, name)
        name = re.sub(r"(down|up)_blocks\.(\d+)\.(downsamplers|upsamplers)\.(0)\.conv\.", block, name)
        start, _, part = name.rpartition(".")
        inside = start.rpartition(".")[2]
        if inside in RESNET and "transformer_blocks" not in name:
            name = f"{start.removesuffix(inside)}{RESNET[inside]}.{part}"
        return name

    return {renamed(name): tensor for name, tensor in unet.state_dict().items()}


def vae_tensors(vae) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1

    def renamed(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
            for old, new in VAE_ATTENTION.items():
                name = name.replace(f".{old}.", f".{new}.")
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    tensors = {renamed(name): tensor for name, tensor in vae.state_dict().items()}
    return {k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in tensors.items()}


def clip_tensors(encoder, prefix: str) -> dict[str, Tensor]:
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    positions = torch.arange(len(tensors["embeddings.position_embedding.weight"]))[None]
    return {prefix + name: tensor for name, tensor in {**tensors, "embeddings.position_ids": positions}.items()}


def open_clip_tensors(encoder, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's names: query, key and value in one matrix, the projection transposed."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    width = encoder.config.hidden_size
    tensors = {
        "positional_embedding": own.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": own.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": own.pop("final_layer_norm.weight"),
        "ln_final.bias": own.pop("final_layer_norm.bias"),
        "text_projection": own.pop("text_projection.weight", torch.zeros(width, width)).T,
        "logit_scale": torch.tensor(4.6),
    }
    for name in list(own):
        new = name.replace("encoder.layers.", "transformer.resblocks.")
        for old, replacement in OPEN_CLIP.items():
            new = new.replace(f".{old}.", f".{replacement}.")
        if ".q_proj." in name:
            parts = [own[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            tensors[new.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[new] = own[name]
    return {prefix + name: tensor for name, tensor in tensors.items()}
