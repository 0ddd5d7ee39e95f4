"""Stable Diffusion at toy size, twice with the same weights: a diffusers pipeline, and ComfyUI's MODEL and CLIP.

Tokenizers are ComfyUI's own, of the full vocabulary and 77 positions.
"""

import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.text_encoders.sd2_clip
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CPU = torch.device("cpu")
SIZES = {"l": 64, "g": 96, "h": 80}
CONFIGS = {"sd1": comfy.supported_models.SD15, "sd2": comfy.supported_models.SD20, "sdxl": comfy.supported_models.SDXL}
CONTEXT = {"sd1": 64, "sd2": 80, "sdxl": 64 + 96}


def _encoder(kind, width, layers, act):
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=77, hidden_act=act, projection_dim=width,
        bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    encoder = kind(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return encoder


class Toy:
    """One base in both programs: `pipe`, and `model` and `clip`; `size` of the latent drawn last."""

    def __init__(self, family):
        self.family = family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.pipe = self._pipeline()
            self.pipe.set_progress_bar_config(disable=True)
            self.model = self._model()
            self.clip = self._clip()

    def _pipeline(self):
        family, folder = self.family, comfy.sd1_clip.__file__.replace("sd1_clip.py", "sd1_tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
        unet = {
            "sample_size": 8, "cross_attention_dim": CONTEXT[family], "block_out_channels": (64, 128),
            "layers_per_block": 2 if family == "sdxl" else 1,
            "use_linear_projection": family != "sd1", "attention_head_dim": 8 if family == "sd1" else (1, 2),
        }  # fmt: skip
        if family == "sdxl":
            unet |= {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 6 * 256 + SIZES["g"],
            }  # fmt: skip
        else:
            unet |= {
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            }
        model = UNet2DConditionModel(**unet).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        parts = {
            "vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
            "unet": model,
            "scheduler": DDIMScheduler(
                1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="linspace", clip_sample=False
            ),
            "tokenizer": tokenizer,
        }
        if family == "sdxl":
            second = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!")
            return StableDiffusionXLPipeline(
                **parts, text_encoder=_encoder(CLIPTextModel, SIZES["l"], 3, "quick_gelu"), tokenizer_2=second,
                text_encoder_2=_encoder(CLIPTextModelWithProjection, SIZES["g"], 3, "gelu"), add_watermarker=False,
            )  # fmt: skip
        if family == "sd2":
            parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!")
        width, act = (SIZES["l"], "quick_gelu") if family == "sd1" else (SIZES["h"], "gelu")
        return StableDiffusionPipeline(
            **parts, text_encoder=_encoder(CLIPTextModel, width, 2, act), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip

    def _model(self):
        family = self.family
        config = {
            "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True,
            "legacy": False, "in_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
            "use_linear_in_transformer": family != "sd1", "context_dim": CONTEXT[family],
            "num_heads": 8 if family == "sd1" else -1, "num_head_channels": -1 if family == "sd1" else 64,
            "use_temporal_attention": False, "use_temporal_resblock": False,
        }  # fmt: skip
        if family == "sdxl":
            config |= {
                "num_res_blocks": [2, 2], "transformer_depth": [0, 0, 2, 2], "transformer_depth_middle": 2,
                "transformer_depth_output": [0, 0, 0, 2, 2, 2],
                "num_classes": "sequential", "adm_in_channels": 6 * 256 + SIZES["g"],
            }  # fmt: skip
        else:
            config |= {
                "transformer_depth": [1, 0], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 0, 0],
                "num_classes": None, "adm_in_channels": None,
            }  # fmt: skip
        supported = CONFIGS[family](config)
        supported.set_inference_dtype(torch.float32, None)
        model = supported.get_model({}, "", device=CPU)
        names = comfy.utils.unet_to_diffusers(supported.unet_config)
        weights = {names[key]: value.clone() for key, value in self.pipe.unet.state_dict().items()}
        model.diffusion_model.load_state_dict(weights)
        return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)

    def _clip(self):
        family = self.family
        kind, tokenizer = {
            "sd1": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
            "sd2": (comfy.text_encoders.sd2_clip.SD2ClipModel, comfy.text_encoders.sd2_clip.SD2Tokenizer),
            "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        }[family]
        options = {
            f"clip_{name}_model_config": {
                "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2 if family == "sd1" else 3,
                "num_attention_heads": 2,
            }
            for name, width in SIZES.items()
        }  # fmt: skip
        names = {"sd1": ["l"], "sd2": ["h"], "sdxl": ["l", "g"]}[family]
        encoders = kind(device="cpu", dtype=torch.float32, model_options=options)
        for name, component in zip(names, ("text_encoder", "text_encoder_2"), strict=False):
            weights = {
                key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": value.clone()
                for key, value in getattr(self.pipe, component).state_dict().items()
            }
            getattr(encoders, f"clip_{name}").transformer.load_state_dict(weights, strict=False)
        clip = comfy.sd.CLIP(no_init=True)
        clip.cond_stage_model, clip.layer_idx, clip.use_clip_schedule = encoders, None, False
        clip.patcher = comfy.model_patcher.ModelPatcher(encoders, load_device=CPU, offload_device=CPU)
        clip.patcher.is_clip, clip.apply_hooks_to_conds, clip.tokenizer_options = True, None, {}
        clip.tokenizer = tokenizer(embedding_directory=None)
        return clip

    def encoded(self, prompt):
        """What diffusers encodes a prompt to, (1, 77, D)."""
        return self.pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]

    def noise_prediction(self, x, t, context, y, control):
        """diffusers' UNet; `y` is ComfyUI's joined pooled prompt and sizes, `control` what its ControlNet adds."""
        added = {}
        if control is not None:
            added = {
                "down_block_additional_residuals": control["output"],
                "mid_block_additional_residual": control["middle"][0],
            }
        if self.family == "sdxl":
            height, width = (8.0 * cells for cells in self.size)
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).repeat(len(x), 1)
            added |= {"added_cond_kwargs": {"text_embeds": y[:, : SIZES["g"]], "time_ids": sizes}}
        return self.pipe.unet(x, t, encoder_hidden_states=context, **added).sample

    def draw(self, model, positive, negative, *, steps=2, cfg=4.0, size=8, batch=1, seed=1):
        """A latent, and the arguments and the result of every UNet call. `size`: of the latent, or (height, width)."""
        calls = []

        def spy(executor, x, t, context, y=None, control=None, options=None, **extra):
            copies = tuple(None if value is None else value.clone() for value in (x, t, context, y))
            added = None if control is None else {key: list(values) for key, values in control.items()}
            out = executor(x, t, context, y, control, options, **extra)
            calls.append((*copies, added, out.clone()))
            return out

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", spy)
        self.size = height, width = size if isinstance(size, tuple) else (size, size)
        noise = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))
        zero = torch.zeros_like(noise)
        with torch.inference_mode():
            latent = comfy.sample.sample(
                model, noise, steps, cfg, "euler", "normal", positive, negative, zero, disable_pbar=True, seed=seed
            )
        return latent, calls
