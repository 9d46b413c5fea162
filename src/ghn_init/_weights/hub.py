"""The Hugging Face hub: fetching a repository's files, and uploading a folder.

huggingface_hub takes longer to import than a prediction takes, so this module is imported where it is used.
"""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever library huggingface_hub uses
    LocalEntryNotFoundError,
)

from ghn_init._errors import CheckpointError, first_line
from ghn_init._weights.directory import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE: Final = 10.0
"""Seconds that the hub has for its first answer."""


def fetch(repo: str, file: str | None = None, **options: Any) -> Path:
    """The folder of a repository's weights, or one `file` of it, in the cache; from there where offline.

    Options are those of `huggingface_hub.hf_hub_download`.

    Raises:
        CheckpointError: A repository or file that cannot be reached and is not in the cache.
    """
    with _hub_errors(repo, file), _no_second_try():
        silence = None if options.get("local_files_only") else _silence(repo, file or WEIGHTS_FILE, options)
        if silence is None:
            return _fetched(repo, file, options)
        try:
            return _fetched(repo, file, options | {"local_files_only": True})
        except LocalEntryNotFoundError:
            raise silence from None


def _silence(repo: str, file: str, options: dict[str, Any]) -> Exception | None:
    """What keeps the hub from telling of a file, asked once; None where it does.

    huggingface_hub itself asks six times: for half a minute where there is no connection, for more than one
    where the hub stalls.
    """
    url = huggingface_hub.hf_hub_url(repo, file, revision=options.get("revision") or "main")
    try:
        huggingface_hub.get_hf_file_metadata(url, token=options.get("token"), timeout=PATIENCE)
    except HfHubHTTPError:  # an answer: what it means is found when the files are asked for
        return None
    except (OSError, HTTPError) as error:
        return error
    return None


@contextmanager
def _no_second_try() -> Iterator[None]:
    """Inside, a download of this thread that stalls ends with huggingface_hub's first timeout, of 10 s.

    It would try six times, for more than a minute. Before it tries again it tells its logger, and that is the
    only place to step in that all its versions have. Where the connection breaks it may try again.
    """
    thread = threading.get_ident()

    def give_up(_: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        if threading.get_ident() == thread and error is not None and "timed out" in str(error):
            raise error
        return True

    logger = logging.getLogger("huggingface_hub.file_download")
    logger.addFilter(give_up)
    try:
        yield
    finally:
        logger.removeFilter(give_up)


def _fetched(repo: str, file: str | None, options: dict[str, Any]) -> Path:
    if file is not None:
        return Path(huggingface_hub.hf_hub_download(repo, file, **options))
    weights, config = (
        Path(huggingface_hub.hf_hub_download(repo, name, **options)) for name in (WEIGHTS_FILE, CONFIG_FILE)
    )
    if config.parent != weights.parent:
        raise EntryNotFoundError("another revision, uploaded in this moment; load it again")
    return weights.parent


def make_repository(repo: str, *, private: bool | None, token: str | bool | None, branch: str | None) -> str:
    """Make a repository, and a branch of it, if need be; returns its whole name, "org/name".

    Raises:
        CheckpointError: It cannot be reached or made.
    """
    api = huggingface_hub.HfApi(token=token)
    with _upload_errors(repo):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
    return name


def upload(
    folder: Path,
    repo: str,
    *,
    token: str | bool | None,
    branch: str | None,
    commit_message: str | None,
    create_pr: bool,
) -> str:
    """Upload a folder to a repository; returns the commit's address.

    Raises:
        CheckpointError: It cannot be reached, or takes nothing from this user.
    """
    with _upload_errors(repo):
        return huggingface_hub.HfApi(token=token).upload_folder(
            folder_path=folder,
            repo_id=repo,
            revision=branch,
            commit_message=commit_message,
            create_pr=create_pr,
        )


@contextmanager
def _upload_errors(repo: str) -> Iterator[None]:
    """Turn the hub's errors while something is written there into one of ours that says what to do."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"hf://{repo}: expected a repository to upload to, found {type(error).__name__}: "
            f"{first_line(error)}; check its name, that the token may write to it (`hf auth login`, "
            "HF_TOKEN), and the connection (HF_ENDPOINT, HF_HUB_OFFLINE)"
        ) from error


@contextmanager
def _hub_errors(repo: str, file: str | None = None) -> Iterator[None]:
    """Turn the hub's errors into one of ours that says what to do."""
    try:
        yield
    except (OSError, HTTPError, EntryNotFoundError, HFValidationError) as error:
        files = file or f"{WEIGHTS_FILE} and {CONFIG_FILE}"
        other = "" if file else f"; a published file there is hf://{repo}/FILE.pt"
        raise CheckpointError(
            f"hf://{repo}: expected a repository with {files}, found "
            f"{type(error).__name__}: {first_line(error)}; check its name and revision, the connection "
            f"(HF_ENDPOINT, HF_HUB_OFFLINE) and, if it is private, the token{other}"
        ) from error
