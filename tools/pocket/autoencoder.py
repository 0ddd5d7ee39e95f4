"""Stage `autoencoder`: pictures of 128 px to latents of 4 × 16 × 16 and back (`AutoencoderKL`, f = 8).

Loss: L1 + 4 · L2 + ¼ · L1 of the differences between neighbours (edges), 0.03 of noise on the latents so that the
decoder forgives a denoiser's small errors, and 1e-3 · z². No sampling, no adversary: flat artwork needs neither.

`--start` names an older pocket. If its autoencoder is one of 64 px pictures (f = 4), with the same latents, its layers
are taken over, the new full-resolution level is learned, and `--keep-code` · |z - z'|² holds the new code z at the old
encoder's code z' of the halved picture: its denoiser is then a start for ours, and draws 128 px at once. The price:
what the old code lost, ours has lost, too (on crowded scenes it gives 28.4 dB at 64 px); a free code has no such bound.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from tools.pocket import artwork, subjects
from tools.pocket.scenes import Painter, Palette, Scene, compose
from tools.pocket.training import Draws, Plan, copy_matching, train

CHANNELS = (16, 32, 96, 192)  # few where there are 128² pixels, which cost most; many where shapes are remembered
NOISE = 0.03
FOLLOWED = 500  # first steps in which half of what the decoder sees is the older code, which ours does not give yet
# Crowded scenes, for background costs as much and teaches nothing; the rest so that nothing is strange.
MIX = {"alone": 4, "beside": 2, "stacked": 1, "row": 1, "four": 4}
SEEN_STYLES = [style for style in subjects.STYLES if style != subjects.HELD_OUT_STYLE]


def fresh() -> AutoencoderKL:
    levels = len(CHANNELS)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )
    for name, module in model.named_modules():
        if name.endswith("conv2"):  # every residual branch starts at nothing
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def start_from(model: AutoencoderKL, older: AutoencoderKL) -> None:
    """Take over an autoencoder of as many levels, or of one less: its levels are then our inner ones."""
    shift = missing_levels(older)
    weights = {}
    for name, value in older.state_dict().items():
        head, *rest = name.split(".")
        if head == "encoder" and rest[0] == "down_blocks":
            rest[1] = str(int(rest[1]) + shift)
        outer = rest[0] in ("conv_in", "conv_out", "conv_norm_out") and (head, rest[0]) not in INNER
        if not (shift and outer):
            weights[".".join([head, *rest])] = value
    copy_matching(model, weights)


def missing_levels(older: AutoencoderKL) -> int:
    return len(CHANNELS) - len(older.config.block_out_channels)


INNER = {("encoder", "conv_out"), ("encoder", "conv_norm_out"), ("decoder", "conv_in")}


def pictures(painter: Painter, palette: Palette, rng: random.Random, count: int) -> Tensor:
    """(count, 3, 128, 128) in [-1, 1]; half of them mirrored, for here it costs no caption its truth."""
    kinds = rng.choices(list(MIX), list(MIX.values()), k=count)
    rows = [painter.array(compose(rng, palette, kind, jitter=1.0)) for kind in kinds]
    return as_tensor([row[:, ::-1] if rng.random() < 0.5 else row for row in rows])


def as_tensor(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def as_array(batch: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8."""
    return batch.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()


def encode(model: AutoencoderKL, x: Tensor) -> Tensor:
    return model.encode(x).latent_dist.mode()


class Retold(Painter):
    """Draws some scenes as the autoencoder tells them again, from a code as noisy as a denoiser leaves it.

    What judges are shown must look like what they will judge. Which scenes, and the noise, depend on the scene alone.
    """

    def __init__(self, sprites: np.ndarray, model: AutoencoderKL, share: float = 0.25, noise: float = 0.1):
        super().__init__(sprites)
        self.model, self.share, self.noise = model.eval(), share, noise

    @torch.no_grad()
    def draw(self, scene: Scene) -> Image.Image:
        picture = super().draw(scene)
        chance = random.Random(repr(scene))
        if chance.random() >= self.share:
            return picture
        z = encode(self.model, as_tensor([np.asarray(picture)]))
        z += self.noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(chance.getrandbits(60)))
        return Image.fromarray(as_array(self.model.decode(z).sample)[0])


def run(
    work: Path, *, start: Path | None, steps: int, rate: float, batch: int, keep_code: float, freeze_encoder: bool
) -> None:
    sprites, index = artwork.load(work)
    painter = Painter(sprites)
    palette = Palette(index, [*subjects.TRAINED, *subjects.OTHERS], SEEN_STYLES, emphasis={})
    torch.manual_seed(0)
    model = fresh()
    folder = work / "autoencoder"
    older = AutoencoderKL.from_pretrained(start, subfolder="vae").eval().requires_grad_(False) if start else None
    if older:
        start_from(model, older)
    kept_scale = older.config.scaling_factor if older else None
    if freeze_encoder:  # the code stays as it is, and so does the denoiser that was trained on it
        kept_scale = AutoencoderKL.load_config(folder / "final")["scaling_factor"]
        older = None

    def loss_of(model: nn.Module, draws: Draws, step: int) -> tuple[Tensor, dict[str, float]]:
        x = pictures(painter, palette, draws.python, batch)
        z = encode(model, x)
        kept = torch.zeros(())
        seen = z
        if older:
            goal = encode(older, F.interpolate(x, scale_factor=0.5 ** missing_levels(older), mode="area"))
            kept = F.mse_loss(z, goal)
            seen = torch.where(torch.arange(batch).view(-1, 1, 1, 1) % 2 == 0, z, goal) if step < FOLLOWED else z
        y = model.decode(seen + NOISE * torch.randn(z.shape, generator=draws.torch)).sample
        error = y - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        square = error.square().mean()
        loss = error.abs().mean() + 4 * square + 0.25 * edges + 1e-3 * z.square().mean() + keep_code * kept
        return loss, {"mse": square.item(), "code": kept.item(), "std": z.std().item()}

    held = held_pictures(painter, palette)

    def prepare(model: nn.Module) -> None:
        if freeze_encoder:  # as it is in `final`, where it is an average of what the checkpoint has
            final = load(work).state_dict()
            copy_matching(model, {name: final[name] for name in final if name.startswith(("encoder.", "quant_conv."))})
            model.get_submodule("encoder").requires_grad_(False)
            model.get_submodule("quant_conv").requires_grad_(False)

    def sheet(model: nn.Module, step: int) -> None:
        again = reconstruct(model, held)
        print(f"step {step} PSNR {psnr(again, held):.2f} dB", flush=True)
        rows = [np.concatenate(list(as_array(batch[:8])), 1) for batch in (held, again)]
        Image.fromarray(np.concatenate(rows, 0)).save(folder / f"step-{step:06}.png")

    plan = Plan(steps, rate, decay=0.6, average=0.99, checkpoint_every=100, sheet_every=100)
    best = train(folder, model, plan, loss_of, sheet, prepare)
    finish(best)
    # The denoiser wants latents of variance 1, and one that is started from an older one its scale.
    with torch.no_grad():
        scale = kept_scale or 1 / encode(best, held).std().item()
    best.register_to_config(scaling_factor=scale)
    best.save_pretrained(folder / "final")


def held_pictures(painter: Painter, palette: Palette) -> Tensor:
    """64 scenes that no training step draws: another seed."""
    return pictures(painter, palette, random.Random("unseen"), 64)


@torch.no_grad()
def reconstruct(model: AutoencoderKL, x: Tensor) -> Tensor:
    return torch.cat([model.decode(encode(model, part)).sample for part in x.split(16)])


def psnr(y: Tensor, x: Tensor) -> float:
    """Of all pixels together; peak 2, for values lie in [-1, 1]."""
    return 10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), x)).item()


def load(work: Path) -> AutoencoderKL:
    """The trained one, in float32."""
    return AutoencoderKL.from_pretrained(work / "autoencoder" / "final").eval()


def finish(model: AutoencoderKL) -> None:
    """Make the posterior a point: nothing was trained to sample from it, so encoding must give its mode."""
    quant = model.get_submodule("quant_conv")  # (8, 8, 1, 1): four means, four logarithms of variances
    with torch.no_grad():
        quant.get_parameter("weight")[4:].zero_()
        quant.get_parameter("bias")[4:].fill_(-30)
