"""Reading images from folders, archives and arrays, and keeping what was decoded for the next time."""

from __future__ import annotations

import getpass
import hashlib
import io
import os
import re
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from ghn_init._errors import TrainingError
from ghn_init._files import reason, replacing
from ghn_init.training.data import SPLITS, Images

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from os import PathLike

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"})

_DECODED: Final = 2
"""Changes with what is made of a source, so that images kept by an earlier version are not taken for it."""


def load_images(
    source: str | PathLike[str], split: str, *, cache: str | PathLike[str] | None = None
) -> Images:
    """Read all images of a split ("train" or "test").

    Args:
        source: One of
            - an .npz file with `train_images` (N, H, W, 3) uint8, `train_labels`, `test_...`;
            - a folder with such a folder as `train/` and as `test/` as has one folder per class (an
              ImageFolder), or that folder itself, which is then "train";
            - a .tar, .tar.gz or .tar.xz of that; a folder that holds `*train*.tar.xz` and so on;
            - the folder of torchvision's CIFAR10 or CIFAR100 (`cifar-10-batches-py`).
        split: "train" or "test".
        cache: Folder for decoded images, so that a second run starts at once; default: one of the user's
            own in the system's temporary folder. Where it cannot be used they are decoded every time.

    Raises:
        TrainingError: Nothing readable there, no such split, or images of several sizes or of more than 8
            bits.
    """
    if split not in SPLITS:
        raise TrainingError(f"split {split!r}; expected 'train' or 'test'")
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody, whom the system does not know
        raise TrainingError(f"{source}: {error}") from error
    try:
        return _load(_find(path, split), split, cache)
    except OSError as error:
        raise TrainingError(f"{error.filename or path}: cannot be read ({reason(error)})") from error


def _load(path: Path, split: str, cache: str | PathLike[str] | None) -> Images:
    if path.suffix == ".npz":
        return _read_npz(path, split)
    if (found := _torchvision_cifar(path, split)) is not None:
        return found
    folder = Path(cache).expanduser() if cache else _own_cache()
    if folder is None:
        return _decode(_files(path, split), path)
    stored = folder / _cache_name(path, split)
    with suppress(TrainingError):  # it is not there yet, or cannot be read
        return _read_npz(stored, split)
    images = _decode(_files(path, split), path)
    with suppress(OSError):
        _write_npz(stored, images, split)
    return images


def _find(path: Path, split: str) -> Path:
    if not path.exists():
        raise TrainingError(f"{path}: no such file or folder; expected images (a folder, .tar.xz or .npz)")
    if path.is_dir():
        archives = sorted(p for p in path.glob(f"*{split}*") if ".tar" in p.suffixes)
        if archives and not (path / split).is_dir():
            return archives[0]
    return path


def _own_cache() -> Path | None:
    """A folder of the user's in the system's temporary one, where everybody may write; None if there is none.

    Somebody else's folder of that name is not used: what it holds would be taken for the images.
    """
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    try:
        folder = Path(tempfile.gettempdir()) / f"ghn-init-images-{user}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = not hasattr(os, "getuid") or folder.lstat().st_uid == user
    except OSError:
        return None
    return folder if mine else None


def _cache_name(path: Path, split: str) -> str:
    """The name under which the decoded images of a source are kept; another one when a file of it changes."""
    source = f"{_DECODED}/{path.resolve()}/{split}"
    found = hashlib.blake2b(source.encode(errors="surrogateescape"), digest_size=12)
    files = _image_files(_root(path, split)) if path.is_dir() else [("", path)]
    for name, file in files:
        stat = file.stat()
        line = f"\n{name}/{file.name}/{stat.st_size}/{stat.st_mtime_ns}"
        found.update(line.encode(errors="surrogateescape"))
    return f"{found.hexdigest()}.npz"


def _root(path: Path, split: str) -> Path:
    """The folder with one folder per class.

    Raises:
        TrainingError: There is none for this split.
    """
    if (path / split).is_dir():
        return path / split
    if any((path / other).is_dir() for other in SPLITS) or not _is_of(path, split):
        raise _missing(path, split)
    return path


def _is_of(path: Path, split: str) -> bool:
    """Whether a source without folders for splits is of this one: what its name says, or else "train"."""
    named = re.search(rf"(?<![a-z]){split}(?![a-z])", path.name.lower())  # not in "latest"
    return split == "train" or named is not None


def _missing(path: Path, split: str) -> TrainingError:
    """For a source whose images are not of this split: to measure on those of training would be wrong."""
    return TrainingError(f"{path}: no {split} split; expected a folder {split}/ with one folder per class")


def _image_files(root: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """(class name, file) of all image files, sorted by name."""
    found = [
        (folder.name, file)
        for folder in os.scandir(root)
        if folder.is_dir()
        for file in os.scandir(folder)
        if Path(file.name).suffix.lower() in SUFFIXES
    ]
    return sorted(found, key=lambda entry: (entry[0], entry[1].name))


_DAMAGED: Final = (
    tarfile.InvalidHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
    tarfile.TruncatedHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
)


class _Member(tarfile.TarInfo):
    """A member of an archive. Where tarfile takes a damaged header for the end, this is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except _DAMAGED as error:
            raise tarfile.ReadError(f"a member's header is damaged: {error}") from error


def _files(path: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """(class name, encoded image) of all image files, sorted by name."""
    if path.is_dir():
        for name, file in _image_files(_root(path, split)):
            yield name, Path(file).read_bytes()
        return
    found: list[tuple[str, bytes]] = []
    try:
        with tarfile.open(path, tarinfo=_Member) as archive:
            # In the archive's own order: seeking back in a compressed archive starts it again.
            for member in archive:
                name = Path(member.name)
                if name.suffix.lower() in SUFFIXES and (content := archive.extractfile(member)):
                    found.append((member.name, content.read()))
    except Exception as error:  # tarfile's, or of any kind from what decompresses
        raise TrainingError(f"{path}: not a readable archive of images ({error})") from error
    nested = {of: [entry for entry in found if of in Path(entry[0]).parts[:-2]] for of in SPLITS}
    flat = found and not any(nested.values()) and _is_of(path, split)
    if found and not flat and not nested[split]:
        raise _missing(path, split)
    for name, content in sorted(nested[split] or found):
        yield Path(name).parent.name, content


def _decode(files: Iterable[tuple[str, bytes]], path: Path) -> Images:
    from PIL import Image

    names: list[str] = []
    pixels: list[np.ndarray] = []
    for name, content in files:
        try:
            with Image.open(io.BytesIO(content)) as image:
                deep = image.mode[:1] in "IF"  # (it would be cut off at 255, not scaled)
                pixels.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # its decoders raise what they like for a damaged file
            raise TrainingError(f"{path}: image {len(names)} of class {name} is damaged ({error})") from error
        if deep:
            raise TrainingError(
                f"{path}: image {len(names)} of class {name} has 16 bits a pixel or more; expected 8 "
                "(convert the images, or give an .npz)"
            )
        names.append(name)
        if pixels[-1].shape != pixels[0].shape:
            raise TrainingError(
                f"{path}: an image of shape {pixels[-1].shape} in class {name}; expected {pixels[0].shape} "
                "as the first one (resize them, or give an .npz)"
            )
    if not names:
        raise TrainingError(f"{path}: no images; expected one folder per class with {sorted(SUFFIXES)} files")
    classes = tuple(sorted(set(names)))
    labels = torch.tensor([classes.index(name) for name in names])
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels, classes)


def _write_npz(path: Path, images: Images, split: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{split}_images": images.pixels.permute(0, 2, 3, 1).numpy(),
        f"{split}_labels": images.labels.numpy(),
        "classes": np.array(images.classes),
    }
    # In one piece: another process may be reading or writing the same cache.
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] (takes any names)


def _read_npz(path: Path, split: str) -> Images:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            pixels, labels = file[f"{split}_images"], file[f"{split}_labels"].reshape(-1)
            classes = file.get("classes")
            counted = [file[name] for name in (f"{of}_labels" for of in SPLITS) if name in file]
    except Exception as error:  # numpy, zipfile and zlib each have their own for a damaged file
        raise TrainingError(f"{path}: cannot read {split}_images and {split}_labels ({error})") from error
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise TrainingError(
            f"{path}: {split}_images is {pixels.dtype} {pixels.shape}; expected uint8 (N, H, W, 3)"
        )
    if not _whole(labels):
        raise TrainingError(
            f"{path}: {split}_labels is {labels.dtype} {labels.shape}; expected whole numbers (N,) from 0, "
            "with the classes' names in `classes`"
        )
    if classes is None:
        classes = np.arange(max(int(numbers.max(initial=-1)) for numbers in counted if _whole(numbers)) + 1)
    if classes.ndim != 1:
        raise TrainingError(f"{path}: classes is {classes.dtype} {classes.shape}; expected names (C,)")
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    try:
        return Images(tensor, torch.from_numpy(labels.astype(np.int64)), tuple(map(str, classes.tolist())))
    except TrainingError as error:
        raise TrainingError(f"{path}: {error}") from error


def _whole(values: np.ndarray) -> bool:
    """Whether these are whole numbers, of whatever type."""
    if values.dtype.kind not in "biuf":
        return False
    with np.errstate(invalid="ignore"):
        return np.array_equal(values, values.astype(np.int64))


def _torchvision_cifar(path: Path, split: str) -> Images | None:
    """The images of torchvision's CIFAR10 or CIFAR100 if `path` holds them, else None."""
    from torchvision import datasets

    for dataset in (datasets.CIFAR10, datasets.CIFAR100):
        if (path / dataset.base_folder).is_dir():
            try:
                data = dataset(str(path), train=split == "train")
            except RuntimeError as error:
                raise TrainingError(
                    f"{path}: not a whole {dataset.__name__} of torchvision ({error})"
                ) from error
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            return Images(pixels, torch.tensor(data.targets), tuple(data.classes))
    return None
