"""Repositories on the Hugging Face hub: downloads at one fixed commit, the right to write, uploads."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from reverie_jax.errors import UserError

Kind = Literal["model", "dataset"]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class HubError(UserError):
    """A repository that cannot be read or written; the message names it."""


def repository_id(name: str) -> str:
    """Return the repository that a model is named by, without its revision; empty for paths and packaged models."""
    repository = name.partition("@")[0]
    return repository if _NAME.fullmatch(repository) and not Path(name).exists() else ""


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its type, and that of its cause."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    more = "" if error.__cause__ is None else reason(error.__cause__)
    return line if more in line else f"{line} {more}"


def look_up(repository: str, revision: str | None) -> Any:
    """Return what the hub knows of a dataset at a revision: `huggingface_hub.DatasetInfo` with its files' sizes.

    Raises:
        HubError: It cannot be asked, or knows no such dataset.
    """
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the hub client raises dozens of kinds
        raise _unreadable(repository, error) from None


def download(label: str, info: Any, names: Sequence[str], *, pinned: bool, licence: str = "") -> Path:
    """Return the folder of a dataset in the hub's cache; what is missing of some files is downloaded.

    Licence and size are logged before the download.

    Args:
        label: Begins the line of the log.
        info: The dataset, of `look_up`; its commit is read.
        names: The files.
        pinned: Whether a revision was asked for.
        licence: Where the dataset's card states none.

    Raises:
        HubError: The download fails.
    """
    import huggingface_hub

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    _log.info(
        "%s: datasets/%s at %s%s: %d files, %s MB, licence: %s; what is in the cache is not downloaded again",
        *(label, info.id, info.sha, "" if pinned else " (today's commit; none is pinned)"),
        *(len(names), f"{sum(sizes[name] for name in names) / 1e6:,.1f}"),
        getattr(info.card_data, "license", None) or licence or "not stated there; ask its authors",
    )
    exact = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    try:
        return Path(
            huggingface_hub.snapshot_download(info.id, repo_type="dataset", revision=info.sha, allow_patterns=exact)
        )
    except Exception as error:
        raise _unreadable(info.id, error) from None


def _unreadable(repository: str, error: Exception) -> HubError:
    return HubError(f"datasets/{repository} cannot be downloaded ({reason(error)})")


def check_access(name: str, kind: Kind, *, public: bool) -> None:
    """Check that one may write to a repository, and create it if it does not exist. Meant to be called before any work.

    The token is that of `huggingface_hub`: HF_TOKEN, or of `hf auth login`.

    Args:
        name: owner/name.
        kind: Of the repository.
        public: Whether a new one is public. One that exists stays as it is.

    Raises:
        HubError: The name is none, there is no token, or it does not allow to write there.
    """
    import huggingface_hub

    if not _NAME.fullmatch(name):
        raise HubError(f"{name}: not a repository of the hub; write it as owner/name")
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"{name}: writing to the hub needs a token with write access; set HF_TOKEN, or run `hf auth login`"
        )
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, repo_type=kind, private=not public, exist_ok=True)
        api.auth_check(name, repo_type=kind, write=True)
    except Exception as error:
        raise HubError(f"{name}: cannot be written on the hub ({reason(error)})") from None


def upload(folder: Path, name: str, kind: Kind, *, again: str) -> str:
    """Upload a folder to a repository that exists; return the address of the commit.

    Args:
        folder: All its files are uploaded; others of the repository stay.
        name: owner/name.
        kind: Of the repository.
        again: The command that repeats the upload, for the error.

    Raises:
        HubError: The upload fails; nothing on this side is lost.
    """
    import huggingface_hub

    message = f"Upload {kind} with reverie-jax"
    try:
        info = huggingface_hub.HfApi().upload_folder(
            repo_id=name, repo_type=kind, folder_path=folder, commit_message=message
        )
    except Exception as error:
        raise HubError(
            f"{name}: the upload failed ({reason(error)}); nothing is lost here, repeat it with `{again}`"
        ) from None
    return str(info.commit_url)
