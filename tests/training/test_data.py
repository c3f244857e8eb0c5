"""Data sets: the same split and batches every time, and errors that name the folder."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch

from splitkern.training import DataError, load_data
from splitkern.training.data import read

pytest.importorskip("sklearn")


def test_digits_are_the_real_ones_enlarged() -> None:
    data = load_data("digits", image_size=24)
    assert (len(data.train), len(data.test), data.class_count) == (1437, 360, 10)  # type: ignore[arg-type]
    images, classes = next(iter(data.test_batches(360)))
    assert images.shape == (360, 3, 24, 24)
    assert images.dtype == torch.float32
    assert torch.equal(images[:, 0], images[:, 2])
    counts = torch.bincount(classes)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert abs(images.mean()) < 0.1
    assert 0.5 < images.std() < 1.5


def test_train_and_test_share_no_image() -> None:
    data = load_data("digits", image_size=8)
    train = {images.numpy().tobytes() for images, _ in data.train}  # type: ignore[attr-defined]
    test = {images.numpy().tobytes() for images, _ in data.test}  # type: ignore[attr-defined]
    assert not train & test
    assert len(train) + len(test) == 1797


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = load_data("digits", image_size=8)

    def classes(seed: int, epoch: int) -> list[int]:
        torch.rand(3)  # the global generator moves on between calls
        return torch.cat([batch for _, batch in data.train_batches(100, seed=seed, epoch=epoch)]).tolist()

    assert classes(0, 1) == classes(0, 1)
    assert classes(0, 1) != classes(0, 2)
    assert classes(0, 1) != classes(1, 1)
    assert len(classes(0, 0)) == 1400
    assert classes(2**63 - 1, 1) == classes(2**63 - 1, 1), "a seed beyond what fits with its epoch in 64 bits"


def test_batches_leave_the_global_generator_alone() -> None:
    data = load_data("digits", image_size=8)
    before = torch.get_rng_state()
    for _ in data.train_batches(512, seed=0, epoch=0):
        pass
    for _ in data.test_batches(512):
        pass
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_set_smaller_than_a_batch_is_one_batch() -> None:
    data = load_data("digits", image_size=8)
    (batch,) = data.train_batches(2000, seed=0, epoch=0)
    assert len(batch[1]) == 1437


def test_unknown_data_names_the_allowed_ones() -> None:
    with pytest.raises(DataError, match=r"digits, cifar10, imagenet-folder, got 'mnist'"):
        load_data("mnist", image_size=32)


def test_too_small_images() -> None:
    with pytest.raises(DataError, match="at least 8, got 4"):
        load_data("digits", image_size=4)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["cifar10", "imagenet-folder"])
def test_missing_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs the folder"):
        load_data(name, image_size=32)
    with pytest.raises(DataError, match="nowhere"):
        load_data(name, image_size=32, root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=tmp_path.name):
        load_data(name, image_size=32, root=tmp_path)


def write_images(folder: Path, count: int, size: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (size, size), (index, 100, 200)).save(folder / f"{index}.png")


@pytest.mark.torchvision
def test_folder_of_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / part / name, 3, 40)
    data = load_data("imagenet-folder", image_size=32, root=tmp_path)
    assert data.class_count == 2
    images, classes = next(iter(data.train_batches(6, seed=0, epoch=0)))
    assert images.shape == (6, 3, 32, 32)
    assert sorted(classes.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.torchvision
def test_folder_with_unmatched_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 1, 16)
    write_images(tmp_path / "val" / "dog", 1, 16)
    with pytest.raises(DataError, match=r"same classes, unmatched: \['cat', 'dog'\]"):
        load_data("imagenet-folder", image_size=16, root=tmp_path)


@pytest.mark.torchvision
def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"train lacks images of the form CLASS/NAME\.jpg: .*classes cat"):
        load_data("imagenet-folder", image_size=16, root=tmp_path)
    (tmp_path / "train" / "cat").rmdir()
    write_images(tmp_path / "train" / "cat", 1, 16)
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(DataError, match=r"val lacks images of the form CLASS/NAME\.jpg: .*classes cat"):
        load_data("imagenet-folder", image_size=16, root=tmp_path)


def large_png() -> bytes:
    """One that claims to be of 30000x30000 pixels, from which Pillow protects its user."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.torchvision
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\x89PNG no more", "cannot identify image file"), (large_png(), "decompression bomb")],
    ids=["damaged", "bomb"],
)
def test_unreadable_image_is_named(tmp_path: Path, content: bytes, reason: str, workers: int) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part / "cat", 2, 40)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(content)
    data = load_data("imagenet-folder", image_size=32, root=tmp_path)
    with pytest.raises(DataError) as caught:
        list(read(data.train_batches(2, seed=0, epoch=0, workers=workers)))
    message = str(caught.value)
    assert message.startswith(f"image {tmp_path}/train/cat/1.png cannot be read: ")
    assert reason in message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1
