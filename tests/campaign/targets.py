"""Every verb that writes, into everything that cannot or must not be written."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel

from campaign import fork_server, kills, laws, materials, processes
from campaign.processes import Counter
from fusion.base_models import opening

RESUMED = ("train", "distill")
OTHERS = b"somebody else's work"


@dataclass(frozen=True)
class Writer:
    """A verb that writes: its words for a target file, or for a folder."""

    name: str
    words: Callable[[Path], list[str]]
    ending: str  # of the target; empty: it is a folder
    beside: str = ""  # ending of a second file of the same result
    large: bool = False  # the result takes more than 16 kB


def writers(base: Path) -> list[Writer]:
    on = ["--base", str(base), "--device", "cpu"]
    rex, tom = "lib/rex.safetensors", "lib/tom.safetensors"
    steps = ["--max_train_steps", "2", "--checkpointing_steps", "1", "--targets", "unet.attn2.to_k"]
    train = ["train", "--token", "<dog>", "--noun", "dog", "--instance_data_dir", "data", *on, *steps]

    def training(target: Path) -> list[str]:
        return [*train, "--output_dir", str(target.parent), "--output_name", target.stem]

    def output(*words: str) -> Callable[[Path], list[str]]:
        return lambda target: [*words, "-o", str(target)]

    return [
        Writer(
            "train",
            lambda t: [*train, "--output_dir", str(t.parent), "--output_name", t.stem],
            ".safetensors",
            large=True,
        ),
        Writer("fuse", output("fuse", rex, tom), ".safetensors", large=True),
        Writer("export", output("export", rex, "--to", "kohya"), ".safetensors", "_rex.safetensors", large=True),
        Writer("distill", output(*kills.distillation(base)), ".safetensors", "_rex.safetensors", large=True),
        Writer("generate", output("generate", rex, "--prompt", "a <rex>", *on), ".png"),
        Writer("generate, folder", output("generate", rex, "--prompt", "a <rex>", *on), ""),
        Writer("compare", output("compare", rex, "--prompt", "a <rex>", "--strengths", "1", *on), ".png"),
        Writer("bake", output("bake", rex, "--gating", "none", *on), "", large=True),
        Writer("inspect", lambda t: ["inspect", rex, tom, "--plot", str(t)], ".png"),
        Writer("comfyui", output("comfyui"), "", large=True),
        Writer("space", lambda t: [*kills.SPACE, "--output_dir", str(t)], "", large=True),
        Writer("library add", lambda t: ["library", str(t), "--add", rex], ""),
    ]


class Table:
    """One writer into one target after the other, each in a process and a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.problems = folder, dict[str, str](), list[str]()
        self.work = folder / "targets"

    def fresh(self) -> Path:
        return laws.fresh(self.work, *kills.parts(self.folder))

    def impossible_targets(self, writer: Writer) -> None:
        """What is known before the work: refused before the UNet has run once."""
        for case, make in CASES.items():
            target = make(self.fresh() / "out" / f"x{writer.ending}", writer)
            if target is not None:
                passes, unprivileged = Counter(), case == "folder without rights"
                words = writer.words(target.relative_to(self.work))
                ending = processes.run(words, self.work, lambda: watched(passes, unprivileged), timeout=60)  # noqa: B023
                self.judge(writer, case, ending, passes.value)

    def full_disk(self, writer: Writer, sizes: tuple[int, ...] = (0, 3000)) -> None:
        """No room: by a limit on the size of files; on a disk that is nearly full, which is then enlarged."""
        words = writer.words(Path("out") / f"x{writer.ending}")
        for size in sizes:
            ending = processes.run(words, self.fresh(), lambda: processes.limit_file_size(size), timeout=60)  # noqa: B023
            self.judge(writer, f"no more than {size} bytes", ending)
        for case, filled in [("full disk", 16), ("nearly full disk", 0)][: 2 if writer.large else 1]:
            disk = self.fresh() / "out"
            disk.mkdir()
            if mounted(disk, "16k"):
                (disk / "filler").write_bytes(bytes(filled * 1024))
                self.judge(writer, case, processes.run(words, self.work, timeout=60))
                subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
                self.finish(writer, words)
                subprocess.run(["umount", "-l", disk], check=True)

    def finish(self, writer: Writer, words: list[str]) -> None:
        """Where there is room again, the same command succeeds; a training, resumed if it has a checkpoint."""
        resume = ["--resume_from_checkpoint", "latest"]
        for again in [[*words, *resume], words] if writer.name in RESUMED else [words]:
            ending = processes.run(again, self.work, timeout=60)
            if ending.code == 0:
                return
        self.problems.append(f"{writer.name} / with room again: {ending.last_lines}")

    def judge(self, writer: Writer, case: str, ending: processes.Ending, passes: int = 0) -> None:
        """One line, exit code 1 or 2, nothing of others changed, nothing left over."""
        errors = sum(line.startswith("error:") for line in ending.output.splitlines())
        conditions = {
            f"exit code {ending.code}": ending.code in (1, 2),
            "a traceback": not ending.traceback,
            f"{errors} lines of errors": errors == 1,
            f"{passes} passes of the UNet before it": passes == 0,
            "somebody else's file is changed": case not in CHANGEABLE or OTHERS in map(content, files(self.work)),
            f"left over: {laws.hidden_files(self.work)}": not laws.hidden_files(self.work),
        }
        problems = [problem for problem, holds in conditions.items() if not holds]
        self.rows[f"{writer.name} / {case}"] = "; ".join(problems)
        if problems:
            self.problems.append(f"{writer.name} / {case}: {'; '.join(problems)}\n  {ending.last_lines}")


def watched(passes: Counter, unprivileged: bool) -> None:
    """In a child: count the passes of the UNet, and obey the permissions of folders."""
    forward = UNet2DConditionModel.forward

    def counting(*args: object, **options: object) -> object:
        passes.add()
        return forward(*args, **options)

    UNet2DConditionModel.forward = counting
    if unprivileged:
        processes.obey_permissions()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def content(path: Path) -> bytes:
    return path.read_bytes()


def mounted(folder: Path, size: str) -> bool:
    """Whether a small file system of its own could be mounted there; it lives as long as the fork server."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return bool(fork_server.namespace()) and subprocess.run(words, capture_output=True).returncode == 0


def _folder_as_target(target: Path, writer: Writer) -> Path | None:
    if not writer.ending:
        return None
    (target / "inside").mkdir(parents=True)
    return target


def _file_as_parent(target: Path, writer: Writer) -> Path:
    target.parent.write_bytes(OTHERS)
    return target


def _folder_without_rights(target: Path, writer: Writer) -> Path:
    target.parent.mkdir()
    target.parent.chmod(0o500)
    return target


def _name_too_long(target: Path, writer: Writer) -> Path:
    return target.with_name("x" * 300 + writer.ending)


def _path_too_long(target: Path, writer: Writer) -> Path:
    return Path(target.parent, *["x" * 200] * 25, target.name)


def _pipe(target: Path, writer: Writer) -> Path:
    target.parent.mkdir()
    os.mkfifo(target)
    return target


def _device(target: Path, writer: Writer) -> Path:
    target.parent.mkdir()
    target.symlink_to("/dev/full")
    return target


def _others_file(target: Path, writer: Writer) -> Path | None:
    """A file where a file is to be written; where a folder is, one in it that a command would replace."""
    if writer.name == "generate, folder":
        return None  # it takes another name
    target.parent.mkdir()
    target.write_bytes(OTHERS)
    return target


def _others_file_beside(target: Path, writer: Writer) -> Path | None:
    if not writer.beside:
        return None
    target.parent.mkdir()
    target.with_name(target.stem + writer.beside).write_bytes(OTHERS)
    return target


def _others_folder(target: Path, writer: Writer) -> Path | None:
    if writer.name not in ("bake", "comfyui", "space"):
        return None
    target.mkdir(parents=True)
    (target / "model_index.json").write_bytes(OTHERS)
    return target


def _other_ending(target: Path, writer: Writer) -> Path | None:
    other = {".png": ".jpg", ".safetensors": ".pt"}.get(writer.ending)
    return target.with_suffix(other) if other and writer.name != "train" else None


CASES: dict[str, Callable[[Path, Writer], Path | None]] = {
    "folder as target": _folder_as_target,
    "file as parent": _file_as_parent,
    "folder without rights": _folder_without_rights,
    "name too long": _name_too_long,
    "path too long": _path_too_long,
    "pipe": _pipe,
    "full device": _device,
    "somebody's file": _others_file,
    "somebody's file beside it": _others_file_beside,
    "somebody's folder": _others_folder,
    "another ending": _other_ending,
}
CHANGEABLE = ("file as parent", "somebody's file", "somebody's file beside it", "somebody's folder")


def run(folder: Path, names: list[str] | None = None, sizes: tuple[int, ...] = (0, 3000)) -> tuple[dict, list[str]]:
    """Every verb into every target. Returns what is wrong, by row of the table, and each problem with its output."""
    table, pipe = Table(folder), opening.open_pipeline(folder / materials.BASE, device="cpu")
    opening.open_pipeline = lambda *_, **__: pipe
    for writer in writers(folder / materials.BASE):
        if names is None or writer.name in names:
            table.impossible_targets(writer)
            table.full_disk(writer, sizes)
    return table.rows, table.problems
