"""The base of the measurements: Stable Diffusion 1.5's exact shape with random weights, or the same at toy size."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept, DigestCache
from fusion.models.devices import as_device, as_dtype
from fusion.models.layer_sites import matrix, sites
from fusion.models.pipelines import base_info
from fusion.models.targets import GATED_TARGETS, UNGATED_TARGETS, resolve
from fusion.models.tokens import initial_rows
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum

TOKENIZER = Path(__file__).parent.parent / "assets/pocket/tokenizer"

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest is diffusers' default
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TOY_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 64,
    "attention_head_dim": 2,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
TOY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


class Base:
    """A pipeline, and adapters for it; all computed on first use."""

    def __init__(self, *, toy: bool, device: str = "cpu", latents: int = 32) -> None:
        self.toy, self.device = toy, as_device(device)
        self.rank = 4 if toy else 8
        self.latents = 8 if toy else latents  # height and width of the latents

    @cached_property
    def pipe(self) -> StableDiffusionPipeline:
        """On a GPU in the precision in which bases are opened there."""
        pipe = build_pipeline(TOY_UNET if self.toy else UNET, TOY_TEXT if self.toy else TEXT)
        for model in (pipe.unet, pipe.text_encoder, pipe.vae):
            nn.Module.to(model, self.device, as_dtype(None, self.device))
        return pipe

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Canonical layer name -> base weight (O, I) of the paper's targets: 176 layers at full size."""
        places = sites(self.pipe)
        patterns = [t for t in UNGATED_TARGETS if t != "text_encoder_2"]
        return {name: matrix(places[name]) for name in resolve(patterns, places)}

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """Full spectra of `weights`, which are replaced by weights made of them: that needs no SVD."""
        return {name: _with_known_spectrum(weight) for name, weight in self.weights.items()}

    def layers(self, *, gated: bool, unet_only: bool = False) -> list[str]:
        patterns = [t for t in (GATED_TARGETS if gated else UNGATED_TARGETS) if t != "text_encoder_2"]
        names = resolve(patterns, self.weights)
        return [name for name in names if name.startswith("unet.") or not unet_only]

    def adapter(
        self, kind: str, k: int = 0, *, gated: bool = False, unet_only: bool = False, trained: bool = True
    ) -> Adapter:
        """An adapter of type `kind` on slice k; `trained` fills it with random values."""
        concept, names = Concept(f"<concept-{k}>", "dog"), self.layers(gated=gated, unet_only=unet_only)
        slices = min(len(self.spectra[name].S) for name in names) // self.rank
        directions = SpectralSlice.contiguous(k % slices, self.rank)  # of many gated adapters, some share a slice
        layers = {
            name: ADAPTERS[kind].fresh(self.weights[name].float(), directions, spectrum=self.spectra[name])
            for name in names
        }
        if trained:
            generator = torch.Generator().manual_seed(k)
            for layer in layers.values():
                for parameter in layer.parameters():
                    parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 1e-3
        gate = (concept.token,) if gated else ()
        branch = Branch(f"concept-{k}", kind, layers, (directions,), (), gate)
        info = AdapterInfo(f"concept-{k}", base_info(self.pipe), (concept,))
        rows = {concept.token: initial_rows(self.pipe, concept)}
        return Adapter(info, (branch,), rows, digest_cache=DigestCache())  # as one that was loaded


def _with_known_spectrum(weight: Tensor) -> Spectrum:
    """Replace a weight (O, I) of variance 1/I by another with a random spectrum, which is returned."""
    generator, count = torch.Generator(weight.device).manual_seed(0), min(weight.shape)
    options: Any = {"generator": generator, "device": weight.device}
    U, V = (torch.linalg.qr(torch.randn(side, count, **options))[0] for side in weight.shape)  # (O, K), (I, K)
    S = torch.linspace(2, 0.05, count, device=weight.device)
    S *= (weight.shape[0] / S.square().sum()) ** 0.5
    weight.copy_((U * S) @ V.T)
    return Spectrum(U.contiguous(), S, V.contiguous())


def build_pipeline(unet: dict[str, Any], text: dict[str, Any]) -> StableDiffusionPipeline:
    """A pipeline of real classes. Its VAE is tiny: no measurement here decodes a picture."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    vocabulary = {"vocab_size": 49408, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with init_empty_weights():
        unet_model = UNet2DConditionModel(**unet)
        text_model = CLIPTextModel(CLIPTextConfig(**text, **vocabulary, max_position_embeddings=77))
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=_with_weights(text_model),
        tokenizer=tokenizer,
        unet=_with_weights(unet_model),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _with_weights(model: Any) -> Any:
    """Random weights of variance 1/fan-in, norms at one: takes seconds, the classes' own initialisation a minute."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty(parameter.shape)
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        else:
            nn.init.constant_(value, 1.0 if name.endswith("weight") else 0.0)
        set_module_tensor_to_device(model, name, "cpu", value=value)
    return model.eval().requires_grad_(False)
