"""The GHN with huggingface_hub's mixin, which takes long to import: only the hub's methods import this."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from ghn_init._errors import CheckpointError
from ghn_init._hypernetwork.model import GHN
from ghn_init._weights.load import CONFIG_FILE, WEIGHTS_FILE, read_directory, save

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_CARD = """---
library_name: ghn-init
license: mit
tags:
- graph-hypernetwork
- model_hub_mixin
- pytorch_model_hub_mixin
---

# Graph hypernetwork

A {kind} with {parameters:,} parameters for {num_classes} classes, saved by ghn-init. It predicts the weights
of a network from its computational graph (Knyazev et al. 2021, arXiv 2110.13100).

```python
import ghn_init

{usage}
```
"""

_KINDS = {"gatedgnn": "graph hypernetwork", "mlp": "per-node hypernetwork (MLP)"}
_USAGE = 'model = ghn_init.predict(model, weights="hf://org/repo")'
_FOREIGN_USAGE = """# {hypernet} is not part of ghn-init: build the module yourself
ghn = ghn_init.load("hf://org/repo", gnn=module)
model = ghn_init.predict(model, weights=ghn)"""


class HubGHN(PyTorchModelHubMixin, GHN, library_name="ghn-init", license="mit"):
    """A GHN that can be saved to, pushed to and loaded from the Hugging Face hub, always strictly."""

    @classmethod
    def of(cls, ghn: GHN) -> HubGHN:
        """The same GHN, sharing its parameters, with the mixin's methods."""
        if isinstance(ghn, cls):
            return ghn
        same = cls.__new__(cls, config=ghn.config)
        same.__dict__.update(ghn.__dict__)
        return same

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> HubGHN:
        """Load from a directory or from a repository of the hub; see the mixin for the options.

        Raises:
            CheckpointError: A repository that cannot be reached and is not in the cache, or bad weights.
        """
        with _hub_errors(str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, **options)

    def generate_model_card(self, **_: Any) -> ModelCard:
        """A card that says what was saved."""
        kind = _KINDS.get(self.config.hypernet, f"graph hypernetwork around `{self.config.hypernet}`")
        parameters = sum(values.numel() for values in self.parameters())
        config = self.config
        usage = _FOREIGN_USAGE.format(hypernet=config.hypernet) if config.foreign else _USAGE
        return ModelCard(
            _CARD.format(kind=kind, parameters=parameters, num_classes=config.num_classes, usage=usage),
            ignore_metadata_errors=True,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        gnn: nn.Module | None = None,
        **_: Any,
    ) -> HubGHN:
        # The mixin reads config.json too, but passes over unknown keys; ours is read strictly.
        if not strict:
            raise CheckpointError(f"{model_id}: strict=False; a GHN is only loaded strictly, leave that out")
        directory = Path(model_id)
        if not directory.is_dir():
            directory = _fetch(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        return cls.of(read_directory(directory, gnn).to(map_location))


def fetch(repo: str, revision: str | None = None, file: str | None = None) -> Path:
    """The folder of a repository's weights, or one file of it, in the cache; from there where offline.

    Raises:
        CheckpointError: A repository or file that cannot be reached and is not in the cache.
    """
    with _hub_errors(repo, file):
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision))
        return _fetch(repo, revision=revision)


def _fetch(repo: str, **options: Any) -> Path:
    """Download the two files of a repository, unless they are in the cache, into one directory."""
    config = Path(hf_hub_download(repo, CONFIG_FILE, **options))
    try:
        # The line above asked for the newest commit; without a connection, asking again takes half a minute.
        offline: dict[str, Any] = options | {"local_files_only": True, "force_download": False}
        weights = None if options.get("force_download") else hf_hub_download(repo, WEIGHTS_FILE, **offline)
    except LocalEntryNotFoundError:
        weights = None
    directory = Path(weights or hf_hub_download(repo, WEIGHTS_FILE, **options)).parent
    if directory != config.parent:
        raise CheckpointError(f"hf://{repo}: the repository changed while it was read; load it again")
    return directory


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
