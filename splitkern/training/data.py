"""The data sets of `splitkern train`: scikit-learn's digits, CIFAR-10 and folders of images.

Nothing is downloaded: the digits come with scikit-learn, the others must lie where `root` says. Batches depend on the
seed and the epoch alone, so that a resumed run sees the batches that the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

DATA_NAMES = ("digits", "cifar10", "imagenet-folder")
DEFAULT_IMAGE_SIZE = {"digits": 64, "cifar10": 32, "imagenet-folder": 224}

Batch = tuple[torch.Tensor, torch.Tensor]
_Collate = Callable[[list[Any]], Batch]

_DIGITS_MEAN, _DIGITS_STD = 0.305, 0.376
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(ValueError):
    """Data that cannot be had; the message names the place and what was expected there."""


@dataclass(frozen=True)
class ImageData:
    """Images for classification.

    Attributes:
        name: which data set.
        train: training set of (image, class) pairs.
        test: test set of (image, class) pairs.
        class_count: number of classes.
        collate: makes a batch ([N, 3, H, W] float32, [N] int64) of a list of pairs; None for PyTorch's own.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    class_count: int
    collate: _Collate | None = None

    def train_batches(self, batch: int, *, seed: int, epoch: int, workers: int = 0) -> DataLoader[Any]:
        """Batches of one epoch, shuffled by (seed, epoch); an incomplete last batch is left out."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        return DataLoader(
            self.train,
            batch_size=batch,
            shuffle=True,
            drop_last=len(self.train) >= batch,  # type: ignore[arg-type]
            generator=generator,
            num_workers=workers,
            collate_fn=self.collate,
        )

    def test_batches(self, batch: int, *, workers: int = 0) -> DataLoader[Any]:
        """The test set in its own order."""
        # A generator of its own: the default would draw a seed for its workers from the global one.
        generator = torch.Generator().manual_seed(0)
        return DataLoader(
            self.test, batch_size=batch, generator=generator, num_workers=workers, collate_fn=self.collate
        )


def read(batches: DataLoader[Any]) -> Iterator[Batch]:
    """The batches; an error of a worker process is the one of this process, without the worker's traceback."""
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).rpartition(f"{__name__}.{DataError.__qualname__}: ")[2].strip()) from error


def load_data(name: str, *, image_size: int, root: Path | None = None) -> ImageData:
    """Opens a data set.

    Args:
        name: "digits", "cifar10" or "imagenet-folder" (`root`/train/CLASS/*.jpg and `root`/val/CLASS/*.jpg).
        image_size: height and width of the images, in pixels.
        root: folder of the data; the digits need none.

    Raises:
        DataError: for an unknown name, an image size below 8, or a folder that cannot be read or has no images.
    """
    if image_size < 8:
        raise DataError(f"image size must be at least 8, got {image_size}")
    if name == "digits":
        return _load_digits(image_size)
    if name not in DATA_NAMES:
        raise DataError(f"data must be one of {', '.join(DATA_NAMES)}, got {name!r}")
    if root is None:
        raise DataError(f"data {name} needs the folder that holds it (--root), got none")
    if not root.is_dir():
        raise DataError(f"data folder {root} is no folder that can be read")
    try:
        return _load_cifar10(root, image_size) if name == "cifar10" else _load_folder(root, image_size)
    except OSError as error:
        raise DataError(f"data folder {root} cannot be read: {error}") from error


class _Digits(Dataset[Any]):
    """8×8 images of handwritten digits, values 0 to 1."""

    def __init__(self, images: torch.Tensor, classes: torch.Tensor) -> None:
        self.images = images
        self.classes = classes

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.classes[index]


@dataclass(frozen=True)
class _EnlargeDigits:
    image_size: int

    def __call__(self, pairs: list[Batch]) -> Batch:
        images = torch.stack([image for image, _ in pairs])[:, None]
        size = (self.image_size, self.image_size)
        images = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        images = (images - _DIGITS_MEAN) / _DIGITS_STD
        return images.repeat(1, 3, 1, 1), torch.stack([label for _, label in pairs])


def _load_digits(image_size: int) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    train_index, test_index = train_test_split(range(len(classes)), test_size=360, stratify=classes, random_state=0)
    all_images = torch.from_numpy(images).float().reshape(-1, 8, 8) / 16
    all_classes = torch.from_numpy(classes).long()
    train = _Digits(all_images[train_index], all_classes[train_index])
    test = _Digits(all_images[test_index], all_classes[test_index])
    return ImageData("digits", train, test, 10, _EnlargeDigits(image_size))


def _load_cifar10(root: Path, image_size: int) -> ImageData:
    from torchvision import datasets
    from torchvision.transforms import v2

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_CIFAR_MEAN, _CIFAR_STD)]
    resize = [v2.Resize(image_size)] if image_size != 32 else []
    augment = [v2.RandomCrop(image_size, padding=image_size // 8), v2.RandomHorizontalFlip()]
    try:
        train = datasets.CIFAR10(str(root), train=True, transform=v2.Compose([*resize, *augment, *last]))
        test = datasets.CIFAR10(str(root), train=False, transform=v2.Compose([*resize, *last]))
    except RuntimeError as error:
        raise DataError(f"data folder {root} holds no complete CIFAR-10 (cifar-10-batches-py): {error}") from error
    return ImageData("cifar10", train, test, 10)


def _load_folder(root: Path, image_size: int) -> ImageData:
    from torchvision import datasets
    from torchvision.transforms import v2

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
    augment = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
    crop = [v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size)]
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(f"data folder {root} must hold the folders train and val, {root / part} cannot be read")

    def images(part: str, transforms: list[Any]) -> Any:
        folder = root / part
        try:
            return datasets.ImageFolder(str(folder), v2.Compose(transforms), loader=_read_image)
        except FileNotFoundError as error:
            raise DataError(f"data folder {folder} lacks images of the form CLASS/NAME.jpg: {error}") from error

    train, test = images("train", [*augment, *last]), images("val", [*crop, *last])
    if train.classes != test.classes:
        unmatched = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"data folder {root}: train and val must hold the same classes, unmatched: {unmatched[:5]}")
    return ImageData("imagenet-folder", train, test, len(train.classes))


def _read_image(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # damaged or hostile files make Pillow raise many types
        raise DataError(f"image {path} cannot be read: {error}") from error
