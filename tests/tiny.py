"""Stable Diffusion at toy size: the real classes with random weights, built in memory, offline, in a fraction
of a second. What a pipeline of the family has in common with its big sisters is structure, not skill.

| family | text encoders (width) | cross-attention | projections | predicts | scheduler |
|---|---|---|---|---|---|
| sd1 | CLIPTextModel (32) | 32 | 1x1 convolutions | epsilon | DDIM |
| sd2 | CLIPTextModel (48) | 48 | linear | v_prediction | DDIM |
| sdxl | CLIPTextModel (32), CLIPTextModelWithProjection (40) | 72 | linear | epsilon | Euler |

Every adapted layer is at least 32 wide, so eight slices of rank 4 fit. Vocabularies, prompt lengths and
widths all differ from the big models'. Pictures are 16 pixels wide, latents 8.
"""

from collections.abc import Callable, Iterable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

FAMILIES = ("sd1", "sd2", "sdxl")
WORDS = ("a", "photo", "picture", "of", "and", "beside", "in", "the", "snow", "dog", "cat", "bird", "robot")
# What the published SD 1.5 and SDXL configs say, wrongly: CLIPTextModel then pools at the largest id.
LEGACY_EOS = 2


def pipeline(family: str, seed: int = 0) -> DiffusionPipeline:
    """A fresh pipeline; equal seeds give equal weights. The global random state is left as it was."""
    build: dict[str, Callable[[], DiffusionPipeline]] = {"sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = build[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(words: Iterable[str] = WORDS, *, length: int = 16, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level BPE tokenizer that keeps `words` whole and spells everything else."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *(a + "</w>" for a in alphabet)])}
    merges: list[tuple[str, str]] = []
    for word in words:
        start, *rest = [*word[:-1], word[-1] + "</w>"]
        for symbol in rest:
            if (start, symbol) not in merges:
                merges.append((start, symbol))
            start += symbol
            vocabulary.setdefault(start, len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=length)


def old_clip_layout(text_encoder: nn.Module) -> nn.Module:
    """The same weights under the names of transformers < 5.6, with a `text_model.` level.

    CLIPTextModelWithProjection kept that level, so it is returned as it is.
    """
    return text_encoder if hasattr(text_encoder, "text_model") else _OldCLIPTextModel(text_encoder)


class _OldCLIPTextModel(CLIPPreTrainedModel):
    config_class = CLIPTextConfig
    base_model_prefix = "text_model"

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__(text_model.config)
        self.text_model = text_model
        self.train(text_model.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def forward(self, *args, **options):
        return self.text_model(*args, **options)


def _sd1() -> DiffusionPipeline:
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(CLIPTextModel, words, width=32, heads=2, eos=LEGACY_EOS),
        tokenizer=words,
        unet=_unet(cross_attention_dim=32, attention_head_dim=2, use_linear_projection=False),
        scheduler=_ddim("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2() -> DiffusionPipeline:
    words = tokenizer([*WORDS, "owl", "car"], length=20, pad="!")
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(CLIPTextModel, words, width=48, heads=4),
        tokenizer=words,
        unet=_unet(cross_attention_dim=48, attention_head_dim=(2, 4), use_linear_projection=True),
        scheduler=_ddim("v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> DiffusionPipeline:
    words, words_2 = tokenizer(), tokenizer([*WORDS, "hat"], pad="!")
    time_width, projected = 8, 24
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(CLIPTextModel, words, width=32, heads=2),
        text_encoder_2=_text_encoder(
            CLIPTextModelWithProjection, words_2, width=40, heads=4, projected=projected, eos=LEGACY_EOS
        ),
        tokenizer=words,
        tokenizer_2=words_2,
        unet=_unet(
            cross_attention_dim=32 + 40,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=6 * time_width + projected,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def _unet(**options) -> UNet2DConditionModel:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    return UNet2DConditionModel(**(sizes | blocks | options)).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
    ).eval()


def _text_encoder(kind, words: CLIPTokenizer, *, width: int, heads: int, projected: int = 24, eos=None):
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=words.model_max_length,
        projection_dim=projected,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id if eos is None else eos,
        pad_token_id=words.pad_token_id,
    )
    return kind(config).eval()


def _ddim(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def save_judge(folder) -> None:
    """A CLIPModel of random weights with its processor: enough to tell colours and shapes apart."""
    words = tokenizer()
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": words.model_max_length}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    image = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config=image | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    CLIPProcessor(images, words).save_pretrained(folder)
