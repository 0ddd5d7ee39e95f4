"""An adapter in a repository on the Hub: its file, its LoRA and embeddings for diffusers, pictures and a card."""

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fusion.adapters.adapter import Adapter
from fusion.errors import FormatError, OutputError
from fusion.formats.adapter_file import save
from fusion.formats.hub_file import HUB_FILE, LIBRARY, hub_errors, hub_problem
from fusion.formats.lora_export import export
from fusion.formats.picture_file import as_picture, decode
from fusion.formats.png_file import write_png
from fusion.generation.recipe import recipe_of
from fusion.hub.adapter_card import LORA_FILE, instance_prompt, model_card

# What an earlier push has written, and this one may not.
_REPLACED = ["images/picture-*.png", f"{LORA_FILE.removesuffix('.safetensors')}*.safetensors"]


def check_push(repo_id: str, *, private: bool = True, token: str | None = None, overwrite: bool = False) -> str:
    """Create the repository, or check that it may be written; returns its id with its owner.

    Raises OutputError where that is not possible, and for a repository that holds something else.
    """
    with _one_line(repo_id):
        from huggingface_hub import HfApi, constants

        if constants.is_offline_mode():
            raise OutputError(f"'{repo_id}' cannot be written: HF_HUB_OFFLINE is set.")
        api = HfApi(library_name=LIBRARY, token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files = {*api.list_repo_files(repo)} - {".gitattributes"}
    if files and HUB_FILE not in files and not overwrite:
        raise OutputError(
            f"'{repo}' holds another kind of model ({', '.join(sorted(files)[:3])}); choose another name, or write "
            "into it with --overwrite (overwrite=True)."
        )
    return repo


def push(
    adapter: Adapter, repo_id: str, *, base: str | None = None,
    pictures: Mapping[Path, str] | Mapping[str, str] | None = None, dtype: str = "float16", private: bool = True,
    token: str | None = None, overwrite: bool = False,
) -> str:  # fmt: skip
    """Write `adapter` to the repository `repo_id` ("user/dog"), which is created where it does not exist.

    Beside the adapter it has its LoRA in diffusers' form with the embeddings, and a card. `base`: the base's id on the
    Hub, for the card. `pictures`: files for the card -> their prompts; where that is empty, the prompt is that of the
    picture's recipe. Pictures go without their metadata, and nothing else of this machine goes along. `private` is for
    a repository that is new. Without a `token`, that of `hf auth login` is used. Returns the address of the commit.
    Raises OutputError where the Hub refuses, and DatasetError for a file that is no picture, and what `export` raises.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(adapter, Path(folder, HUB_FILE), dtype)
        prompts: dict[str, str] = {}
        images = [as_picture(decode(Path(file), f"'{file}'", min_side=1)) for file in pictures or {}]
        for number, (file, prompt) in enumerate((pictures or {}).items(), 1):
            name = f"images/picture-{number}.png"
            write_png(Path(folder, name), images[number - 1])
            prompts[name] = prompt or _prompt_of(file) or instance_prompt(adapter)
        picture = images[0] if images else None
        report = export(adapter, Path(folder, LORA_FILE), "diffusers", dtype=dtype, picture=picture)
        # Only now, since all that can fail on this machine is done.
        repo = check_push(repo_id, private=private, token=token, overwrite=overwrite)
        card = model_card(adapter, repo, report, base=base, pictures=prompts)
        card.save(Path(folder, "README.md"))
        with _one_line(repo):
            commit = HfApi(library_name=LIBRARY, token=token).upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Upload {adapter.info.name}",
                delete_patterns=_REPLACED,
            )
    return str(commit.commit_url)


def _prompt_of(picture: str | Path) -> str:
    try:
        return recipe_of(Path(picture)).picture_prompt
    except FormatError:
        return ""


@contextmanager
def _one_line(repo_id: str) -> Generator[None]:
    """Errors of the Hub's client as an OutputError."""
    try:
        yield
    except hub_errors() as error:
        raise OutputError(f"'{repo_id}' cannot be written on the hub: {hub_problem(error)}") from error
