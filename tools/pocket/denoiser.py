"""Stage `denoiser`: UNet and text encoder together, to predict v from noisy latents and a caption.

v-prediction on a schedule that ends in pure noise (Lin et al. 2023, arXiv 2305.08891), timesteps spread evenly over
each batch, one caption in ten empty for guidance. The finished pipeline lands in `denoiser/pipeline`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.pocket import latents
from tools.pocket.autoencoder import load as load_autoencoder
from tools.pocket.half import save_half
from tools.pocket.tokenizer import LENGTH
from tools.pocket.tokenizer import load as load_tokenizer
from tools.pocket.training import BFLOAT16, Draws, Plan, copy_matching, train

CHANNELS = (64, 128, 256)
TEXT_WIDTH = 192
TIMES = 1000
EMPTY = 0.1
# Zeroed at the start of training: what ends a residual branch, and what ends the network.
LAST_OF_BRANCH = ("conv2", "to_out.0", "proj_out", "ff.net.2", "conv_out")

SHEET = (
    "a dog face on a blue background",
    "a glossy style fox on a grey background",
    "a castle on a white background",
    "a tweet style violin on a pink background",
    "a turtle on the left and a pizza on the right on a yellow background",
    "a cat face on the left and a banana on the right",
    "a taco above a flat style bomb on a green background",
    "two red apples on a white background",
    "a lion on the left, a drum in the middle and a tulip on the right on a teal background",
    "a bus on the top left, a ghost on the top right and a candle on the bottom left on a red background",
    "a crab on the top left, a pear on the top right, a taxi on the bottom left and a camel on the bottom right "
    "on a blue background",
    "a zorbly wug",
)


class Denoiser(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel):
        super().__init__()
        self.unet = unet
        self.text = text

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Noisy latents (N, 4, 16, 16), times (N,), tokens (N, 64) to v (N, 4, 16, 16)."""
        return self.unet(x, t, self.text(ids)[0]).sample


def fresh(tokenizer: CLIPTokenizer) -> Denoiser:
    levels = len(CHANNELS)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=[c // 32 for c in CHANNELS],  # diffusers' name for the number of heads
        norm_num_groups=16,
    )
    for name, module in unet.named_modules():
        if name.endswith(LAST_OF_BRANCH):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, weight in text.named_parameters():
        if "embedding" in name:
            nn.init.normal_(weight, std=0.02)
    return Denoiser(unet, text)


def start_from(model: Denoiser, folder: Path) -> None:
    """Take over an older pocket's weights; places beyond its longest caption start as copies of its last."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    new = copy_matching(model.unet, unet.state_dict()) + copy_matching(model.text, text.state_dict())
    print("not in the start:", *(new or ["nothing"]))
    old = text.config.max_position_embeddings
    places = next(w for name, w in model.text.named_parameters() if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        places[old:] = places[old - 1]


def schedule() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TIMES,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(work: Path, model: Denoiser) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=load_autoencoder(work),
        text_encoder=model.text.eval(),
        tokenizer=load_tokenizer(work),
        unet=model.unet.eval(),
        scheduler=schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(work: Path, model: Denoiser) -> None:
    """The finished model, rounded to float16 in place."""
    folder = work / "denoiser" / "pipeline"
    pipe = build_pipeline(work, model)
    pipe.unet.half()
    pipe.vae.half()
    pipe.vae.register_to_config(_name_or_path="")  # else the file would say where on this machine it came from
    pipe.save_pretrained(folder)
    save_half(model.text, folder / "text_encoder")


def run(work: Path, *, start: Path | None, steps: int, rate: float, batch: int, decay: float, name: str) -> None:
    folder = work / name
    Z, ids = latents.load(work)
    tokenizer = load_tokenizer(work)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    scale = AutoencoderKL.load_config(work / "autoencoder" / "final")["scaling_factor"]
    noising = schedule()
    print(f"{len(Z)} latents, standard deviation {Z.float().mul(scale).std():.3f} after scaling")

    def loss_of(model: nn.Module, draws: Draws, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = draws.torch
        rows = torch.randint(len(Z), (batch,), generator=rng)
        z, words = Z[rows].float() * scale, ids[rows].clone()
        words[torch.rand(batch, generator=rng) < EMPTY] = empty
        # One time from each of `batch` equal parts: less noise in the loss than independent ones.
        t = ((torch.arange(batch) + torch.rand(batch, generator=rng)) * TIMES / batch).long()
        noise = torch.randn(z.shape, generator=rng)
        x, v = noising.add_noise(z, noise, t), noising.get_velocity(z, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            guess = model(x, t, words)
        return F.mse_loss(guess.float(), v), {}

    def sheet(model: nn.Module, step: int) -> None:
        pipe = build_pipeline(work, model)
        images = pipe(
            list(SHEET),
            num_inference_steps=20,
            guidance_scale=3.0,
            guidance_rescale=0.5,
            generator=torch.Generator().manual_seed(0),
        ).images
        picture = Image.new("RGB", (6 * 130, 2 * 130))
        for k, image in enumerate(images):
            picture.paste(image, (k % 6 * 130, k // 6 * 130))
        picture.save(folder / f"step-{step:06}.png")
        model.train()

    torch.manual_seed(0)
    model = fresh(tokenizer)
    if start:
        start_from(model, start)
    plan = Plan(steps, rate, warmup=50, decay=decay, average=0.995, weight_decay=0.01, checkpoint_every=100)
    best = train(folder, model, plan, loss_of, sheet)
    save_pipeline(work, best)
