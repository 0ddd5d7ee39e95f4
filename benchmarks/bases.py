"""The base of the measurements: the exact shape of Stable Diffusion 1.5 or SDXL with random weights, or a toy's."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept, DigestCache
from fusion.base_models.single_file import configs_of
from fusion.models.devices import as_device, as_dtype
from fusion.models.layer_sites import components, matrix, sites
from fusion.models.pipelines import base_info
from fusion.models.targets import default_targets, resolve
from fusion.models.tokens import initial_rows
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum

TOKENIZER = Path(__file__).parent.parent / "assets/pocket/tokenizer"

KINDS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
_TOY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY: dict[str, dict[str, Any]] = {  # what is smaller than in the families' own configs
    "unet": {
        "sample_size": 8,
        "cross_attention_dim": 64,
        "attention_head_dim": 2,
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    },
    "vae": {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64},
    "text_encoder": _TOY_TEXT,
    "text_encoder_2": {**_TOY_TEXT, "projection_dim": 64},
}
TOY_SDXL_UNET = {
    "cross_attention_dim": 128,
    "transformer_layers_per_block": (1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 64,
}


class Base:
    """A pipeline of a family ("sd1" or "sdxl"), and adapters for it; all computed on first use."""

    def __init__(self, *, toy: bool, device: str = "cpu", latents: int = 32, family: str = "sd1") -> None:
        self.toy, self.device, self.family = toy, as_device(device), family
        self.rank = 4 if toy else 8
        self.latents = 8 if toy else latents  # height and width of the latents

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        return build_pipeline(self.family, self.device, toy=self.toy)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Canonical layer name -> base weight (O, I) of the paper's targets: 176 layers of Stable Diffusion 1.5."""
        places = sites(self.pipe)
        return {name: matrix(places[name]) for name in resolve(self._targets(gated=False), places)}

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """Spectra of `weights`, which are replaced by weights made of them: that needs no SVD.

        They are full ones, but SDXL's weights are made of the directions of two slices: more would not fit on a GPU.
        """
        depth = 2 * self.rank if self.family == "sdxl" else None
        return {name: _with_known_spectrum(weight, depth) for name, weight in self.weights.items()}

    def copy(self) -> "Base":
        """Another base of the same weights."""
        assert self.spectra  # weights are replaced before they are copied
        other = Base(toy=self.toy, device=str(self.device), latents=self.latents, family=self.family)
        for name in KINDS.keys() & self.pipe.components.keys():
            getattr(other.pipe, name).load_state_dict(getattr(self.pipe, name).state_dict())
        return other

    def _targets(self, *, gated: bool) -> tuple[str, ...]:
        return default_targets(components(self.pipe), gated=gated)

    def layers(self, *, gated: bool, unet_only: bool = False) -> list[str]:
        names = resolve(self._targets(gated=gated), self.weights)
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


def _with_known_spectrum(weight: Tensor, depth: int | None) -> Spectrum:
    """Replace a weight (O, I) of variance 1/I by one with a random spectrum of `depth` values, which is returned."""
    generator, count = torch.Generator(weight.device).manual_seed(0), min(*weight.shape, depth or max(weight.shape))
    options: Any = {"generator": generator, "device": weight.device}
    U, V = (torch.linalg.qr(torch.randn(side, count, **options))[0] for side in weight.shape)  # (O, K), (I, K)
    S = torch.linspace(2, 0.05, count, device=weight.device)
    S *= (weight.shape[0] / S.square().sum()) ** 0.5
    weight.copy_((U * S) @ V.T)
    return Spectrum(U.contiguous(), S, V.contiguous())


def build_pipeline(family: str, device: torch.device, *, toy: bool) -> DiffusionPipeline:
    """A pipeline of real classes, with weights made on the device in the precision in which bases are opened there."""
    folder, models = configs_of(family), dict[str, Any]()
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    vocabulary = {"vocab_size": 49408, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name in (name for name in KINDS if (folder / name).exists()):
        values = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        if toy:
            values |= TOY[name] | (TOY_SDXL_UNET if (family, name) == ("sdxl", "unet") else {})
        kind: Any = KINDS[name]
        with init_empty_weights():
            of_text = name.startswith("text")
            model = kind(CLIPTextConfig.from_dict(values | vocabulary)) if of_text else kind.from_config(values)
        models[name] = _with_weights(model, device)
    models |= {"tokenizer": tokenizer, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)}
    if family == "sdxl":
        pipe = StableDiffusionXLPipeline(**models, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**models, **unused)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _with_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """Random weights of variance 1/fan-in, norms at one: takes seconds, the classes' own initialisation a minute."""
    generator, dtype = torch.Generator(device).manual_seed(0), as_dtype(None, device)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        path, _, last = name.rpartition(".")
        model.get_submodule(path).register_parameter(last, nn.Parameter(value, requires_grad=False))
    return model.to(device).eval()
