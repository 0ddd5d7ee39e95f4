"""Adapters, LoRAs, moments, checkpoints, spectra and libraries: how they are changed, and what is done with them."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusion
from campaign import materials
from campaign.mutations import Mutations
from campaign.text_inputs import FIELDS, changed_toml
from fusion.adapters.adapter import Adapter
from fusion.errors import FusionError
from fusion.formats.adapter_file import read_info
from fusion.library.spectrum_cache import cached_spectrum
from fusion.training.checkpoint import read_checkpoint

ORTHONORMAL = 0.35  # how far U and V of an accepted basis may be from it; attach warns of what is less


def one_of(folder: Path, mutations: Mutations) -> Path:
    return mutations.random.choice(sorted(folder.iterdir()))


def safetensors_from(name: str) -> Callable[[Mutations, Path, Path], Path]:
    """Changed files of a folder of valid ones, or of one valid file."""

    def write(mutations: Mutations, inputs: Path, work: Path) -> Path:
        seed = one_of(inputs / name, mutations) if (inputs / name).is_dir() else inputs / name
        path = work / "x.safetensors"
        path.write_bytes(mutations.safetensors(seed.read_bytes()))
        return path

    return write


def use_adapter(path: Path, pipe: Any) -> list[str]:
    """Everything that people do with a file that was accepted. What is refused on the way is refused in one line."""
    adapter, problems = fusion.load(path), list[str]()
    problems += [f"{name} is not finite" for name, values in numbers_of(adapter) if not values.isfinite().all()]
    work, refused = path.parent, False
    steps: dict[str, Callable[[], object]] = {
        "read_info": lambda: read_info(path) if adapter.info.provenance.tool[:6] != "import" else None,
        "digest": adapter.digest,
        "save": lambda: fusion.save(adapter, work / "again.safetensors", "float32"),
        "fuse": lambda: fusion.fuse([adapter]),
        "export": lambda: fusion.export(adapter, work / "out.safetensors", "kohya"),
        "compatibility": lambda: fusion.compatibility([adapter], pipe),
        "library": lambda: fusion.Library(work).slice_map(fusion.base_info(pipe)),
    }
    for name, step in steps.items():
        try:
            step()
        except FusionError as error:
            problems += [f"{name} refuses what load accepts: {error}"] if name in ("read_info", "digest") else []
    try:
        fusion.attach(pipe, adapter).detach()
    except FusionError:
        refused = True
    skew = [name for name, values in bases_of(adapter) if not gap(values) < ORTHONORMAL]
    return problems + ([] if refused else [f"{name} is no basis" for name in skew])


def numbers_of(adapter: Adapter) -> list[tuple[str, Tensor]]:
    parts = [
        (f"{n}.{k}", t) for b in adapter.branches for n, la in b.layers.items() for k, t in la.state_dict().items()
    ]
    parts += [(token, row) for token, rows in adapter.tokens.items() for row in rows.values()]
    parts += [("strength", torch.tensor(branch.strength)) for branch in adapter.branches]
    return parts + [(f"ΔW of {n}", t) for n, delta in adapter.deltas().items() for t in (delta.up, delta.down)]


def bases_of(adapter: Adapter) -> list[tuple[str, Tensor]]:
    return [
        (f"{name}.{key}", values)
        for branch in adapter.branches
        for name, layer in branch.layers.items()
        for key, values in layer.state_dict().items()
        if key in ("basis.U", "basis.V") and values.numel()
    ]


def gap(values: Tensor) -> float:
    """How far the columns of a matrix are from orthonormal."""
    return float((values.float().T @ values.float() - torch.eye(values.shape[1])).abs().max())


def use_moments(path: Path, _: Any) -> list[str]:
    moments = [moment for concept in fusion.load_moments(path) for moment in concept.layers.values()]
    good = [m.own.isfinite().all() and m.free.isfinite().all() and math.isfinite(m.floor) for m in moments]
    problems = [] if all(good) else ["a moment is not finite"]
    return problems + (["a floor is negative"] if any(m.floor < 0 for m in moments) else [])


def write_checkpoint(mutations: Mutations, inputs: Path, work: Path) -> Path:
    """Of today's form, or of the form before, whose settings are in a file beside the tensors."""
    folder = work / "checkpoint-2"
    shutil.copytree(inputs / mutations.random.choice(("checkpoint-2", "earlier/checkpoint-2")), folder)
    tensors, state = folder / "state.safetensors", folder / "state.json"
    if state.exists() and mutations.chance(0.6):
        state.write_bytes(mutations.encoded(mutations.changed(json.loads(state.read_text()), 0.2)))
    else:
        tensors.write_bytes(mutations.safetensors(tensors.read_bytes()))
    return folder


def use_checkpoint(path: Path, valid: Mapping[str, Tensor]) -> list[str]:
    """Restored as a training does, and one step taken with it."""
    checkpoint = read_checkpoint(path, {"max_train_steps": 2})
    start, parameters = "parameter.", dict[str, nn.Parameter]()
    shapes = {name.removeprefix(start): tensor.shape for name, tensor in valid.items() if name.startswith(start)}
    for index in range(len(shapes)):  # in an order in which the optimizer's moments fit
        shape = valid[f"optimizer.{index}.exp_avg"].shape
        name = next(name for name in shapes if name not in parameters and shapes[name] == shape)
        parameters[name] = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-3)
    checkpoint.restore(parameters, optimizer, None)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [f"{name} is not finite" for name, parameter in parameters.items() if not parameter.isfinite().all()]


def write_spectrum(mutations: Mutations, inputs: Path, work: Path) -> Path:
    (seed,) = (inputs / "spectra").iterdir()
    (work / "spectra").mkdir()
    path = work / "spectra" / seed.name
    path.write_bytes(mutations.safetensors(seed.read_bytes()))
    return path


def use_spectrum(path: Path, _: Any) -> list[str]:
    """A damaged one is computed again: whatever the file holds, the directions are those of the weight."""
    U, S, V = cached_spectrum(materials.WEIGHT, 8, path.parent)
    difference = (materials.WEIGHT @ V - U * S).abs().max()
    return [] if difference < 1e-2 and max(gap(U), gap(V)) < 0.02 else ["directions of another weight"]


def write_library(mutations: Mutations, inputs: Path, work: Path) -> Path:
    """A library of damaged files, reservations with strange names, and an unfinished training."""
    folder, pick = work / "library", mutations.random
    shutil.copytree(inputs / "library", folder)
    for file in sorted(folder.rglob("*.safetensors")):
        if mutations.chance(0.4):
            file.write_bytes(mutations.safetensors(file.read_bytes()))
    for file in folder.rglob("training.toml"):
        if mutations.chance(0.5):
            file.write_bytes(changed_toml(mutations, file.read_text(), FIELDS))
    slices = ("0-4-1", "0-0-0", "9" * 30 + "-4-1", "-1-4-1", "a-b-c", "", "0-4", "0-70000-1")
    for _ in range(pick.randrange(3)):
        kind = pick.choice(("0" * 16, "kind", ""))
        (folder / f".00000000.{kind}.{pick.choice(slices)}.{pick.choice(('1', '', 'x'))}.reserved").touch()
    if mutations.chance(0.2):
        (folder / pick.choice(("loop.safetensors", "rex.png", ".unfinished/loop"))).symlink_to("loop")
    if mutations.chance(0.2):
        (folder / pick.choice(("tom.safetensors", ".unfinished/tom", ".x.reserved"))).mkdir(exist_ok=True)
    return folder


def use_library(path: Path, pipe: Any) -> list[str]:
    library, base = fusion.Library(path), fusion.base_info(pipe)
    owned = library.slice_map(base)
    [str(training) for training in fusion.find_unfinished_trainings(library).values()]
    with library.reserve(base, 4, capacity=32) as reservation:
        overlap = [entry.owner for entry in owned if entry.slice.overlap(reservation.slice)]
    [library.find(entry.path.stem) for entry in library.adapters()]
    return [f"a slice that {owner} has" for owner in overlap]
