"""Images: reading them from every kind of source, holding out, shuffling, augmenting."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from ghn_init._errors import TrainingError
from ghn_init.training import Images, Normalisation, hold_out, load_images
from ghn_init.training.data import (
    augment,
    batch_indices,
    check_side,
    check_splits,
    generator,
    sized,
)
from training_runs import random_images

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": 4, "test": 2}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images are kept in the system's temporary folder: here, one for every test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ImageFolder of 8 x 8 images in train/ and test/, every one of a colour of its own."""
    root = tmp_path / "images"
    for split, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                colour = (50 * label, 20 * index, 200 if split == "test" else 100)
                Image.new("RGB", (8, 8), colour).save(root / split / name / f"{index:03d}.png")
    return root


def expected(split: str) -> tuple[Tensor, Tensor]:
    colours = [
        (50 * label, 20 * i, 200 if split == "test" else 100)
        for label in range(3)
        for i in range(COUNTS[split])
    ]
    pixels = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)
    return pixels, torch.arange(3).repeat_interleave(COUNTS[split])


def same(images: Images, split: str) -> bool:
    """Whether these are the images of `folder`, in its order."""
    pixels, labels = expected(split)
    found = images.pixels.shape == pixels.shape and images.classes == CLASSES
    return found and torch.equal(images.labels, labels) and torch.equal(images.pixels, pixels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_come_from_a_folder(folder: Path, split: str) -> None:
    assert same(load_images(folder, split), split)
    assert same(load_images(folder / split, split), split)
    other = {"train": "test", "test": "train"}[split]
    assert not same(load_images(folder, other), split)


def test_decoded_images_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    decode = Image.open

    def counted(*args: Any, **options: Any) -> Image.Image:
        opened.append(args)
        return decode(*args, **options)

    monkeypatch.setattr(Image, "open", counted)
    assert same(load_images(folder, "train"), "train")
    assert opened
    opened.clear()
    assert same(load_images(folder, "train"), "train")
    assert not opened


def test_images_that_change_in_a_folder_are_read_again(folder: Path) -> None:
    root = folder / "train"
    first = root / "ant" / "000.png"

    def brightest() -> list[int]:
        return load_images(folder, "train").pixels.amax((1, 2, 3)).tolist()

    found = [brightest()]
    for path in (root / "ant" / "999.png", first, root / "dog" / "000.png"):  # added, changed, a new class
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (250, 250, 250)).save(path)
        os.utime(root, (0, 0))
        found.append(brightest())
    assert [values.count(250) for values in found] == [0, 1, 2, 3]
    first.unlink()
    assert brightest().count(250) == 2
    assert load_images(folder, "train").classes == (*CLASSES, "dog")


def test_images_are_read_without_a_cache_where_none_can_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in its place")
    for cache in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert same(load_images(folder, "train", cache=cache), "train")
    assert same(load_images(folder, "train"), "train")
    (own,) = tmp_path.glob("ghn-init-images-*")
    assert own.stat().st_mode & 0o077 == 0
    (stored,) = own.iterdir()
    stored.write_bytes(b"damaged")
    assert same(load_images(folder, "train"), "train")
    assert stored.stat().st_size > 100
    user = os.getuid() + 1
    theirs = tmp_path / f"ghn-init-images-{user}"
    monkeypatch.setattr("os.getuid", lambda: user)
    theirs.mkdir()
    assert same(load_images(folder, "train"), "train")
    assert not list(theirs.iterdir())
    theirs.rmdir()
    theirs.touch()
    assert same(load_images(folder, "train"), "train")


def test_a_disk_without_room_for_the_cache_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert same(load_images(folder, "train", cache=tmp_path / "cache"), "train")
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "train" / "bee" / "gone.png").symlink_to("nowhere")
    with pytest.raises(TrainingError, match=r"gone\.png: cannot be read \(No such file"):
        load_images(folder, "train")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_archives_beside_each_other_hold_a_split_each(folder: Path, tmp_path: Path, kind: str) -> None:
    mode = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[kind]
    for split in COUNTS:
        with tarfile.open(tmp_path / f"set-{split}.{kind}", mode) as archive:
            archive.add(folder / split, arcname=split)
    assert same(load_images(tmp_path / f"set-train.{kind}", "train"), "train")
    assert same(load_images(tmp_path, "test"), "test")


def test_one_archive_may_hold_both_splits(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(folder, arcname="set")
    for split in COUNTS:
        assert same(load_images(tmp_path / "all.tar", split), split)


def test_images_of_training_are_not_taken_for_those_of_the_test(folder: Path, tmp_path: Path) -> None:
    missing = "no test split; expected a folder test/"
    with pytest.raises(TrainingError, match=missing):
        load_images(folder / "train", "test")
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        archive.add(folder / "train", arcname="set")
    with tarfile.open(tmp_path / "half.tar", "w") as archive:
        archive.add(folder / "train", arcname="set/train")
        archive.add(folder / "test", arcname="set/val")
    for name in ("flat.tar", "half.tar"):
        with pytest.raises(TrainingError, match=missing):
            load_images(tmp_path / name, "test")
        assert same(load_images(tmp_path / name, "train"), "train")
    (folder / "train").rename(tmp_path / "latest")
    with pytest.raises(TrainingError, match=missing):
        load_images(tmp_path / "latest", "test")
    (tmp_path / "latest").rename(folder / "train")
    shutil.rmtree(folder / "test")
    with pytest.raises(TrainingError, match=missing):
        load_images(folder, "test")
    (folder / "train").rename(folder / "test")
    with pytest.raises(TrainingError, match="no train split; expected a folder train/"):
        load_images(folder, "train")


def test_classes_of_both_splits_have_to_be_the_same(folder: Path) -> None:
    check_splits(load_images(folder, "train"), load_images(folder, "test"))
    shutil.rmtree(folder / "test" / "ant")
    found = r"3 classes of training images and 2 of test images \(\['ant'\] in train only\)"
    with pytest.raises(TrainingError, match=found):
        check_splits(load_images(folder, "train"), load_images(folder, "test"))


def test_images_of_both_splits_have_to_have_one_size() -> None:
    with pytest.raises(TrainingError, match="training images of 16 x 16 pixels and test images of 32 x 32"):
        check_splits(random_images(12, 16), random_images(12, 32))


def test_classes_without_names_are_counted_in_both_splits(tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    arrays = {"train_images": pixels, "train_labels": np.arange(3)}
    arrays |= {"test_images": pixels[:2], "test_labels": np.arange(2)}
    np.savez(tmp_path / "set.npz", **arrays)  # pyright: ignore[reportArgumentType]
    assert load_images(tmp_path / "set.npz", "test").classes == ("0", "1", "2")


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_channel_that_is_all_alike_becomes_zero(value: int) -> None:
    images = numbered(50)
    pixels = images.pixels.clone()
    pixels[:, 2] = value
    images = Images(pixels, images.labels, images.classes)
    x = Normalisation.of(images)(images.pixels)
    assert x[:, 2].abs().max() < 1e-4
    torch.testing.assert_close(x[:, :2].std((0, 2, 3), correction=0), torch.ones(2), rtol=1e-3, atol=0)


def test_images_of_more_than_eight_bits_are_refused(folder: Path) -> None:
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    deep.save(folder / "train" / "bee" / "001.png")
    with pytest.raises(TrainingError, match="image 5 of class bee has 16 bits a pixel or more; expected 8"):
        load_images(folder, "train")


def test_a_digest_is_of_the_images_however_they_lie_in_memory() -> None:
    images = numbered(20)
    assert not images.pixels.is_contiguous()
    copied = Images(images.pixels.contiguous(), images.labels, images.classes)
    assert images.digest() == copied.digest() != copied.take(torch.arange(20).flip(0)).digest()


def test_networks_see_square_images() -> None:
    with pytest.raises(TrainingError, match="images of 8 x 16 pixels; expected square ones"):
        check_side(Images(torch.zeros(2, 3, 8, 16, dtype=torch.uint8), torch.zeros(2).long(), ("a",)), 16)


def test_images_come_from_an_npz(tmp_path: Path) -> None:
    arrays = {}
    for split in COUNTS:
        pixels, labels = expected(split)
        arrays |= {f"{split}_images": pixels.permute(0, 2, 3, 1).numpy(), f"{split}_labels": labels.numpy()}
    np.savez(tmp_path / "set.npz", **arrays)
    images = load_images(tmp_path / "set.npz", "test")
    assert images.classes == ("0", "1", "2")
    assert torch.equal(images.pixels, expected("test")[0])
    np.savez(tmp_path / "float.npz", test_images=np.zeros((2, 8, 8, 3)), test_labels=np.zeros(2, int))
    with pytest.raises(TrainingError, match=r"float64 \(2, 8, 8, 3\); expected uint8"):
        load_images(tmp_path / "float.npz", "test")
    with pytest.raises(TrainingError, match="cannot read train_images"):
        load_images(tmp_path / "float.npz", "train")


def test_sources_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="split 'val'; expected 'train' or 'test'"):
        load_images(folder, "val")
    with pytest.raises(TrainingError, match="no such file or folder"):
        load_images(tmp_path / "nothing", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="no images; expected one folder per class"):
        load_images(tmp_path / "empty", "train")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(TrainingError, match="cannot read train_images"):
        load_images(tmp_path / "broken.npz", "train")
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    with pytest.raises(TrainingError, match="not a readable archive"):
        load_images(tmp_path / "broken.tar", "train")
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(TrainingError, match="not a whole CIFAR10 of torchvision"):
        load_images(tmp_path / "cifar", "train")


def test_images_that_do_not_fit_are_refused(folder: Path) -> None:
    Image.new("RGB", (9, 8)).save(folder / "train" / "cat" / "999.png")
    with pytest.raises(TrainingError, match=r"shape \(8, 9, 3\) in class cat; expected \(8, 8, 3\)"):
        load_images(folder, "train")
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    (folder / "test" / "bee" / "001.png").write_bytes(stream.getvalue()[:40])
    with pytest.raises(TrainingError, match="image 3 of class bee is damaged"):
        load_images(folder, "test")
    with pytest.raises(TrainingError, match=r"expected \(N, 3, H, W\) uint8"):
        Images(torch.zeros(2, 3, 4, 4), torch.zeros(2), ("a",))
    with pytest.raises(TrainingError, match="one label for every image"):
        Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3), ("a",))


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_outside_of_the_classes_are_refused(labels: list[int]) -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(TrainingError, match=r"labels from .* and 3 classes; expected 0 to 2"):
        Images(pixels, torch.tensor(labels), CLASSES)


def array(*values: Any) -> np.ndarray:
    return np.array(values)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": array(-1, 0)}, r"set\.npz: labels from -1 to 0 and 1 classes"),
        ({"classes": array("a")}, r"set\.npz: labels from 0 to 1 and 1 classes"),
        ({"train_labels": array("x", "y")}, r"train_labels is <U1 \(2,\); expected whole numbers"),
        ({"train_labels": array(0.5, 1.0)}, r"train_labels is float64 \(2,\); expected whole numbers"),
        ({"train_labels": array(np.nan, 1.0)}, r"train_labels is float64 \(2,\); expected whole numbers"),
        ({"classes": np.array(3)}, r"classes is int64 \(\); expected names \(C,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    sound = {"train_images": np.zeros((2, 8, 8, 3), np.uint8), "train_labels": array(0, 1)}
    np.savez(tmp_path / "set.npz", **sound | arrays)
    with pytest.raises(TrainingError, match=message):
        load_images(tmp_path / "set.npz", "train")
    np.savez(tmp_path / "set.npz", **sound | {"train_labels": array(0.0, 1.0)})
    assert load_images(tmp_path / "set.npz", "train").labels.tolist() == [0, 1]


def test_an_archive_with_a_damaged_header_in_its_middle_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder / "train", "train")
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[-2].offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 100] = b"?" * 100  # its name; the checksum is wrong then
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"set\.tar: not a readable archive.*header is damaged"):
        load_images(path, "train")
    path.write_bytes(content[: offset + 256])
    with pytest.raises(TrainingError, match=r"set\.tar: not a readable archive.*header is damaged"):
        load_images(path, "train")


def damaged(content: bytes) -> Iterator[bytes]:
    """The content with a stretch of noise in one place after another, or cut there."""
    rng = np.random.default_rng(0)
    for place in range(20, len(content), len(content) // 20):
        yield content[:place] + rng.bytes(30) + content[place + 30 :]
        yield content[:place]


def test_damaged_files_are_refused_whatever_their_decoders_raise(folder: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 4, (32, 32, 3), np.uint8)  # which can be compressed
    for index in range(20):
        Image.fromarray(np.roll(noise, index, 0)).save(folder / "train" / "ant" / f"{index:03d}.png")
    for kind in ("gz", "xz", "bz2"):
        with tarfile.open(tmp_path / f"set.tar.{kind}", f"w:{kind}") as archive:  # pyright: ignore
            archive.add(folder / "train", "train")
    np.savez_compressed(tmp_path / "set.npz", train_images=noise[None], train_labels=np.zeros(1, int))
    refused: set[str] = set()
    for source in tmp_path.glob("set.*"):
        for content in damaged(source.read_bytes()):
            path = tmp_path / f"damaged{''.join(source.suffixes)}"
            path.write_bytes(content)
            try:
                load_images(path, "train", cache=tmp_path / "cache")
            except TrainingError as error:
                refused.add(type(error.__cause__).__name__)
    assert refused >= {"LZMAError", "error", "EOFError"}


def test_other_files_are_refused_under_the_names_of_images(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(TrainingError, match=r"array\.npz: cannot read train_images"):
        load_images(tmp_path / "array.npz", "train")
    picture = folder / "train" / "ant" / "000.png"
    for content in damaged(picture.read_bytes()):
        picture.write_bytes(content)
        with suppress(TrainingError):
            load_images(folder, "train")


def numbered(count: int, size: int = 6) -> Images:
    """Images that tell their place: every pixel of image i is i."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, size, size)
    return Images(pixels, torch.arange(count), tuple(map(str, range(count))))


def test_the_hold_out_is_the_same_every_time() -> None:
    images = numbered(50)
    training, validation = hold_out(images, 12)
    assert (len(training), len(validation)) == (38, 12)
    assert sorted([*training.labels.tolist(), *validation.labels.tolist()]) == list(range(50))
    assert torch.equal(hold_out(images, 12)[1].labels, validation.labels)
    assert validation.labels.tolist() != list(range(38, 50))
    assert torch.equal(validation.pixels[:, 0, 0, 0].long(), validation.labels)
    with pytest.raises(TrainingError, match="cannot hold out 50 of 50 images"):
        hold_out(images, 50)
    assert len(hold_out(images)[1]) == len(images) // 5


def test_every_epoch_is_a_permutation_and_can_be_entered_anywhere() -> None:
    steps = [batch_indices(30, 8, step, seed=1) for step in range(9)]
    epochs = [torch.cat(steps[start : start + 3]) for start in (0, 3, 6)]
    assert all(len(set(epoch.tolist())) == 24 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert torch.equal(batch_indices(30, 8, 4, seed=1), steps[4])
    assert not torch.equal(batch_indices(30, 8, 4, seed=2), steps[4])


def test_augmented_images_are_crops_of_padded_ones_some_mirrored() -> None:
    pixels = torch.randint(1, 256, (40, 3, 6, 6), dtype=torch.uint8)
    augmented = augment(pixels, generator(0, "test", 0), padding=2)
    assert augmented.shape == pixels.shape
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    crops = padded.unfold(2, 6, 1).unfold(3, 6, 1)  # (N, 3, 5, 5, 6, 6)
    seen: set[tuple[int, int, bool]] = set()
    for image, all_crops in zip(augmented, crops, strict=True):
        found = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(image, all_crops[:, top, left].flip(-1) if mirrored else all_crops[:, top, left])
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 20
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert torch.equal(augmented, augment(pixels, generator(0, "test", 0), padding=2))
    assert not torch.equal(augmented, augment(pixels, generator(0, "test", 1), padding=2))


def test_normalised_images_have_mean_0_and_deviation_1() -> None:
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(20, dtype=torch.long), ("a",))
    x = Normalisation.of(images)(pixels)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sized(x, 4)[:, :, 0, 0], x[:, :, :2, :2].mean((2, 3)))
