"""An adapter in a repository on the Hugging Face Hub: one file of one name, so that nothing else is listed or read.

    user/dog           the newest state            user/dog@v1, user/dog@4f4f153…    a branch, tag or commit

The Hub's own client downloads it into its cache, from which it is read without a network (HF_HUB_OFFLINE=1).
"""

import os
import re
from pathlib import Path
from typing import Any

from fusion.errors import FormatError

HUB_FILE = "spectral_adapter.safetensors"
LIBRARY = "spectral-fusion"
MAX_SIZE = 8 * 2**30  # bytes of a file that is downloaded
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".png", ".toml", ".json")


def hub_id(path: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Repository and revision, where `path` names no file here; None for a path.

    What exists, what has the ending of a file, and what would be in a folder that exists is a path, as a mistyped
    out/dog is. With a revision (user/dog@main) it is an id even where there is a folder `user`.
    """
    text = path.as_posix() if isinstance(path, Path) else os.fspath(path)
    match = _ID.fullmatch(text)
    if match is None or text.endswith(_ENDINGS) or os.path.exists(path):  # noqa: PTH110 (Path.exists may raise)
        return None
    return (match[1], match[2]) if match[2] or not Path(text).parent.is_dir() else None


def local_file(path: str | os.PathLike[str]) -> Path:
    """The file that `path` names; for the id of a repository, its adapter in the Hub's cache.

    It is downloaded where the cache has another state or none. Raises FormatError for what is not there, and for files
    of more than MAX_SIZE.
    """
    if (name := hub_id(path)) is None:
        return Path(path)
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"revision": name[1], "library_name": LIBRARY}
    try:
        size = hf_hub_download(name[0], HUB_FILE, dry_run=True, **options).file_size or 0
        if size > MAX_SIZE:
            raise FormatError(
                f"The adapter of '{path}' has {size / 1e9:.1f} GB; at most {MAX_SIZE / 1e9:.1f} are read."
            )
        return Path(hf_hub_download(name[0], HUB_FILE, **options))
    except hub_errors() as error:
        raise FormatError(f"'{path}' cannot be read from the hub: {hub_problem(error)}") from error


def pinned(path: str | os.PathLike[str]) -> str:
    """`path`; for the id of a repository, the same one at the commit that the cache has."""
    name = hub_id(path)
    return f"{name[0]}@{local_file(path).parent.name}" if name else str(path)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises."""
    from huggingface_hub import errors

    return (errors.HTTPError, errors.EntryNotFoundError, errors.HFValidationError, OSError)


def hub_problem(error: Exception) -> str:
    """What went wrong with the Hub, and what to do, in one sentence."""
    from huggingface_hub import constants, errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    reasons: list[tuple[bool, str]] = [
        (isinstance(error, errors.HFValidationError), "that is no id of a repository, such as user/dog."),
        (isinstance(error, errors.GatedRepoError), "its owner has to grant access, on its page; then hf auth login."),
        (
            isinstance(error, errors.RepositoryNotFoundError),
            "there is no such repository (nor such a file here), or it is private and needs hf auth login.",
        ),
        (isinstance(error, errors.RevisionNotFoundError), "it has no such branch, tag or commit."),
        (
            isinstance(error, errors.RemoteEntryNotFoundError),
            f"it has no file {HUB_FILE}, which fusion push writes; download the file you mean with hf download.",
        ),
        (status in (401, 403), "access is refused; log in with hf auth login and a token that may do this."),
        (
            constants.is_offline_mode(),
            "HF_HUB_OFFLINE is set, and the cache does not have it.",
        ),
        (
            isinstance(error, errors.LocalEntryNotFoundError),
            f"{constants.ENDPOINT} does not answer, and the cache does not have it.",
        ),
    ]
    text = str(error).strip().splitlines()
    return next((reason for applies, reason in reasons if applies), f"{text[0] if text else type(error).__name__}.")
