"""`GHN`: a hypernetwork that can be saved and loaded."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from ghn_init._errors import CheckpointError
from ghn_init._files import reason, write_bytes
from ghn_init._hypernetwork.model import Hypernetwork
from ghn_init._weights.directory import read_directory, save
from ghn_init._weights.files import readable

if TYPE_CHECKING:
    from os import PathLike

_CARD_FILE: Final = "README.md"

_CARD: Final = """---
library_name: ghn-init
license: mit
tags:
- graph-hypernetwork
---

# Graph hypernetwork

A {network} with {parameters:,} parameters for {num_classes} classes, saved by ghn-init. It predicts the
weights of a network from its computational graph (Knyazev et al. 2021, arXiv 2110.13100).

```python
import ghn_init

model = ghn_init.predict(model, weights="hf://{repo}")
```
"""

_PLACEHOLDER: Final = "org/repo"
"""What a model card calls a repository that is not known."""


class GHN(Hypernetwork):
    """A graph hypernetwork that can be saved to and loaded from a directory or the Hugging Face hub.

    See `Hypernetwork` for what it is made of and what it predicts.
    """

    def digest(self) -> str:
        """A short digest of the configuration and the weights, which says whether two GHNs are the same."""
        state = hashlib.blake2b(json.dumps(self.config.to_dict(), sort_keys=True).encode(), digest_size=8)
        for name, value in sorted(self.state_dict().items()):
            state.update(name.encode())
            state.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return state.hexdigest()

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str | None:
        """Write `model.safetensors`, `config.json` and a model card into a directory, made if need be.

        Args:
            save_directory: The directory. A model card that is there stays.
            repo_id: The repository to upload to, which the model card names; default: the directory's name.
            push_to_hub: Upload it as well.
            private: Whether a new repository is private; default: as the organisation wants it.
            token: The hub's token; default: the one that is stored.

        Returns:
            The address of the commit if it was uploaded.

        Raises:
            CheckpointError: The files cannot be written, or not uploaded.
        """
        directory = Path(save_directory)
        save(self, directory)
        self._save_card(directory / _CARD_FILE, repo_id or "")
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.name, private=private, token=token)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, which is made if need be.

        Args:
            repo_id: The repository, "org/name".
            private: Whether a new repository is private; default: as the organisation wants it.
            token: The hub's token; default: the one that is stored.
            branch: The branch to upload to, made if need be; default: main.
            commit_message: What the commit says.
            create_pr: Propose the commit instead.

        Returns:
            The commit's address.

        Raises:
            CheckpointError: The hub cannot be reached, or takes nothing for this repository from this user.
        """
        from ghn_init._weights.hub import make_repository, upload

        name = make_repository(repo_id, private=private, token=token, branch=branch)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=name)
            return upload(
                Path(folder),
                name,
                token=token,
                branch=branch,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        map_location: str | torch.device = "cpu",
    ) -> GHN:
        """Load strictly from a directory that `save_pretrained` wrote, or from a repository "org/repo".

        Args:
            pretrained_model_name_or_path: The directory or the repository.
            revision: A branch, tag or commit of the repository; default: main.
            cache_dir: Where the repository is kept; default: the hub's cache.
            token: The hub's token; default: the one that is stored.
            force_download: Download what is in the cache, too.
            local_files_only: Look into the cache only.
            map_location: The device that the weights go to.

        Raises:
            CheckpointError: A repository that cannot be reached and is not in the cache, or weights that are
                missing, damaged, or not those of a GHN.
            ConfigError: A configuration with an unknown key or an impossible value.
        """
        directory = Path(pretrained_model_name_or_path)
        with readable(pretrained_model_name_or_path):
            if not directory.is_dir():
                from ghn_init._weights.hub import fetch

                directory = fetch(
                    str(pretrained_model_name_or_path),
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            return read_directory(cls, directory).to(map_location)

    def _save_card(self, file: Path, repo: str) -> None:
        """Write a model card, unless there is one.

        Raises:
            CheckpointError: It cannot be written.
        """
        try:
            if not file.exists():
                write_bytes(file, self._card(repo).encode())
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be written: {reason(error)}; remove what is there, a link to nowhere perhaps"
            ) from error

    def _card(self, repo: str) -> str:
        """A model card that says what was saved, and names the repository if that is a whole name."""
        network = "per-node hypernetwork (MLP)" if self.config.hypernet == "mlp" else "graph hypernetwork"
        parameters = sum(values.numel() for values in self.parameters())
        return _CARD.format(
            network=network,
            parameters=parameters,
            num_classes=self.config.num_classes,
            repo=repo if "/" in repo else _PLACEHOLDER,
        )
