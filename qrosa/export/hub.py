"""An export into a repository of the Hugging Face hub.

Whatever can be known before is asked before anything is written: that the hub may be reached, that somebody is logged
in, and that they may write where they want to. The login is huggingface_hub's own (``hf auth login`` or ``HF_TOKEN``):
a token is never an argument here, nor read. The folder is made first, whole, and then uploaded as one commit: files of
the same names in the repository are replaced in it, others stay, and its history keeps what was there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrosa.errors import InputError, StorageError, first_line

_LOG_IN = "log in with a token that may write: hf auth login"


@dataclass(frozen=True)
class Pushed:
    """Where an export is now.

    Attributes:
        repo: The repository's id.
        url: Its page.
        commit: The commit that holds the files.
    """

    repo: str
    url: str
    commit: str


def check_push(repo: str) -> str:
    """Make sure that a repository can be written to, as far as can be known without writing.

    Args:
        repo: ``NAME``, of whoever is logged in, or ``OWNER/NAME``.

    Returns:
        ``OWNER/NAME``.

    Raises:
        InputError: A name that the hub does not take, no way to the hub, no login, or one that may not write there.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(f"--push-to {repo!r} is no name of a repository", "give NAME or OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"--push-to {repo} needs the hub, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, or leave --push-to out and upload the folder later: hf upload REPO FOLDER",
        )
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise InputError(f"--push-to {repo}: nobody is logged in to the hub", _LOG_IN) from None
    except Exception as error:  # the hub client's errors differ by transport
        raise InputError(
            f"--push-to {repo}: the hub does not answer to this login: {first_line(error)}",
            f"check the network; if that is up, {_LOG_IN}",
        ) from None
    return _owned(repo, user)


def _owned(repo: str, user: dict[str, Any]) -> str:
    """The whole id of a repository that a user may write to.

    Raises:
        InputError: They may not.
    """
    name = str(user.get("name"))
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise InputError(f"--push-to {repo}: the login of {name} may only read", _LOG_IN)
    owner, slash, _ = repo.partition("/")
    known = [name, *(str(org.get("name")) for org in user.get("orgs") or [])]
    if slash and owner not in known:
        raise InputError(f"--push-to {repo}: {name} may not write to {owner}", f"use one of: {', '.join(known)}")
    return repo if slash else f"{name}/{repo}"


def push(folder: Path, repo: str, *, public: bool = False) -> Pushed:
    """Upload a folder into a repository, which is made if it is not there.

    Args:
        folder: A finished export.
        repo: ``OWNER/NAME``, from `check_push`.
        public: Let everybody see a repository that is made now; one that is there stays as it is.

    Raises:
        StorageError: The hub did not take it; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of qrosa")
    except Exception as error:  # the hub client's errors differ by transport
        raise StorageError(
            f"{folder} is written, and the hub did not take it into {repo}: {first_line(error)}",
            f"upload it again: hf upload {repo} {folder}",
        ) from error
    return Pushed(repo, str(url), str(commit.oid))
