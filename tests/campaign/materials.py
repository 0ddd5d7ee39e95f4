"""What the campaign works on: a toy base in a folder, pictures, adapters, and files of every kind that is read."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fusion
import tiny
import trained
from fusion.library.spectrum_cache import cached_spectrum

WEIGHT = torch.linspace(-1, 1, 16 * 12).sin().reshape(16, 12) + torch.eye(16, 12)
BASE = "tiny-sd1"
DEFAULTS = """
[training]
rank = 4
max_train_steps = 6
learning_rate = 1e-2
token_lr = 1e-2
train_batch_size = 2

[distillation]
rank = 4
num_prompts = 16

[generation]
steps = 2
guidance_scale = 2.5
"""


def write_base(folder: Path) -> Path:
    """The toy base as a diffusers folder."""
    base, pipe = folder / BASE, tiny.pipeline("sd1")
    pipe.unet.register_to_config(sample_size=16)  # 32 pixels: class pictures are large enough to be learned
    pipe.save_pretrained(base)
    (base / "fusion.toml").write_text(DEFAULTS)
    return base


def write_pictures(folder: Path, count: int = 3, seed: int = 0) -> Path:
    """Pictures of noise to learn from."""
    noise = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def write_adapters(folder: Path, base: Path) -> None:
    """Two adapters with random values on slices of their own, and one of them as LoRAs."""
    torch.manual_seed(0)
    pipe = fusion.open_pipeline(base, device="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(("rex", "tom")):
        fusion.save(trained.trained_adapter(pipe, f"<{name}>", k=k), folder / f"{name}.safetensors")
    Image.new("RGB", (8, 8)).save(folder / "rex.png")  # the picture beside it goes along with it
    for form in ("kohya", "diffusers"):
        fusion.export(fusion.load(folder / "rex.safetensors"), folder / ".." / "lora" / f"{form}.safetensors", form)


def write(folder: Path) -> None:
    """All of it."""
    base = write_base(folder)
    write_pictures(folder / "data")
    write_adapters(folder / "lib", base)
    (folder / "wheel").mkdir()
    with zipfile.ZipFile(folder / "wheel" / "spectral_fusion-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("spectral_fusion-0.dist-info/METADATA", "Name: spectral-fusion\nRequires-Dist: torch\n")
        wheel.writestr("fusion/data", bytes(20_000))  # more than the limits on files that are tried


def write_inputs(folder: Path) -> None:
    """A valid file of every kind that is read, in `inputs`, for the fuzzer to change."""
    inputs, pipe = folder / "inputs", fusion.open_pipeline(folder / BASE, device="cpu")
    torch.manual_seed(0)
    targets = ["unet.attn2.to_k", "text_encoder.q_proj"]
    adapters = {kind: trained.trained_adapter(pipe, kind=kind, targets=targets) for kind in fusion.ADAPTERS}
    for kind, adapter in adapters.items():
        fusion.save(adapter, inputs / "adapters" / f"{kind}.safetensors", "float32")
    both = fusion.fuse([adapters["additive"], adapters["lora"].renamed({"<rex>": "<tom>"})], allow_overlap=True)
    fusion.save(both, inputs / "adapters" / "fused.safetensors")
    for form in ("kohya", "diffusers"):
        fusion.export(adapters["additive"], inputs / "loras" / f"{form}.safetensors", form)
    (inputs / "embeddings").mkdir()
    (inputs / "loras" / "kohya_rex.safetensors").rename(inputs / "embeddings" / "rex.safetensors")
    (inputs / "loras" / "diffusers_rex.safetensors").unlink()
    fusion.save_moments(fusion.record_moments(pipe, [adapters["additive"]], steps=1), inputs / "moments.safetensors")
    parts = [fusion.Region("a dog", (0, 0, 0.5, 1)), fusion.Region("a cat", mask=Image.new("L", (16, 16), 255))]
    config = fusion.GenerationConfig(prompt="a <rex>", num_inference_steps=1, regions=tuple(parts))
    (picture,) = fusion.generate(pipe, config, [adapters["additive"]])
    picture.save(inputs / "recipe.png")
    _write_dataset(write_pictures(inputs / "data", 2))
    _write_pictures_of_all_kinds(inputs / "pictures")
    _write_training(inputs, pipe)
    write_spectrum(inputs / "spectra")


def _write_dataset(folder: Path) -> None:
    """Captions in metadata.jsonl and texts, masks, and a folder in kohya's form."""
    lines = [{"file_name": f"{number:02d}.png", "text": "a {token} asleep"} for number in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(write_pictures(folder.parent / "more", 1, seed=1), folder / "3_rex dog")
    shutil.rmtree(folder.parent / "more")
    (folder / "3_rex dog" / "00.txt").write_text("a rex in the snow")
    (folder / "masks").mkdir()
    Image.linear_gradient("L").resize((40, 40)).save(folder / "masks" / "00.png")


def _write_pictures_of_all_kinds(folder: Path) -> None:
    folder.mkdir()
    picture = Image.effect_noise((48, 40), 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn
    for mode in ("L", "RGB", "RGBA", "P", "1", "LA", "I;16"):
        picture.convert("I").convert(mode).save(folder / f"{mode.replace(';', '')}.png") if mode == "I;16" else (
            picture.convert(mode).save(folder / f"{mode}.png")
        )
    for name, options in {"turned.jpg": {"exif": exif}, "plain.webp": {}, "lossless.webp": {"lossless": True}}.items():
        picture.convert("RGB").save(folder / name, **options)
    picture.convert("CMYK").save(folder / "cmyk.jpg")


def _write_training(inputs: Path, pipe: object) -> None:
    """A checkpoint of today's form, one of the form before, settings as TOML, and a library with all of it."""
    library = fusion.Library(inputs / "library")
    place = library.new_training_folder("dog")
    shutil.copytree(write_pictures(inputs / "more", 2), place.folder / "pictures")
    shutil.rmtree(inputs / "more")
    values = {"token": "<dog>", "noun": "dog", "instance_data_dir": place.folder / "pictures", "checkpointing_steps": 1}
    values |= {"max_train_steps": 2, "output_dir": place.folder, "library": library.folder, "text_encoder_lr": 0.0}
    values |= {"targets": ["unet.attn2.to_k"], "rank": 2, "validation_prompt": ["a {token}", "two {token}"]}
    config = fusion.TrainingConfig(**values)
    settings = fusion.save_training_settings(place, config)
    *_, last = fusion.train(pipe, config.updated({"validation_prompt": None}))
    fusion.save(last.adapter, place.folder / "dog.safetensors")
    place.release()
    shutil.copytree(last.checkpoint, inputs / "checkpoint-2")
    shutil.copy(settings, inputs / "train.toml")
    shutil.copy(inputs / "adapters" / "additive.safetensors", library.folder / "rex.safetensors")
    before = shutil.copytree(last.checkpoint, inputs / "earlier" / "checkpoint-2") / "state.safetensors"
    with safe_open(before, "pt") as file:
        lasting = json.loads(file.metadata()["state"])["lasting"]
    save_file(load_file(before), before)
    state = {"settings": lasting, "scheduler": {"last_epoch": 2}}
    (before.parent / "state.json").write_text(json.dumps(state))


def write_spectrum(folder: Path) -> Path:
    """The cached spectrum of WEIGHT."""
    cached_spectrum(WEIGHT, 8, folder)
    (file,) = folder.iterdir()
    return file
