"""The Hugging Face hub: fetching a repository's files, and uploading a folder.

huggingface_hub takes longer to import than a prediction takes, so this module is imported where it is used.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from ghn_init._errors import CheckpointError
from ghn_init._weights.directory import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator


def fetch(repo: str, file: str | None = None, **options: Any) -> Path:
    """The folder of a repository's weights, or one `file` of it, in the cache; from there where offline.

    Options are those of `huggingface_hub.snapshot_download`, or of `hf_hub_download` for a file.

    Raises:
        CheckpointError: A repository or file that cannot be reached and is not in the cache.
    """
    with _hub_errors(repo, file):
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, **options))
        names = [WEIGHTS_FILE, CONFIG_FILE]
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=names, **options))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise EntryNotFoundError(f"no {' and no '.join(missing)}")
        return folder


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool | None,
    token: str | bool | None,
    branch: str | None,
    commit_message: str | None,
    create_pr: bool,
) -> str:
    """Upload a folder to a repository, which is made if need be; returns the commit's address."""
    api = huggingface_hub.HfApi(token=token)
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)
    return api.upload_folder(
        folder_path=folder, repo_id=repo, revision=branch, commit_message=commit_message, create_pr=create_pr
    )


@contextmanager
def _hub_errors(repo: str, file: str | None = None) -> Iterator[None]:
    """Turn the hub's errors into one of ours that says what to do."""
    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError) as error:  # the hub's HTTP errors are OSErrors
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        files = file or f"{WEIGHTS_FILE} and {CONFIG_FILE}"
        other = "" if file else f"; a published file there is hf://{repo}/FILE.pt"
        raise CheckpointError(
            f"hf://{repo}: expected a repository with {files}, found "
            f"{type(error).__name__}: {reason}; check its name and revision, the connection (HF_ENDPOINT, "
            f"HF_HUB_OFFLINE) and, if it is private, the token{other}"
        ) from error
