"""A program that trains inside a pipeline, and kills itself at a step if it is told to: run by test_resume.py.

Usage: resumed_program.py FOLDER WORKERS KILL_AT_STEP
"""

from __future__ import annotations

import os
import random
import signal
import sys
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.train.data import digest_of


class Noisy(Dataset[Any]):
    """Samples whose noise comes from the global generators of torch, numpy and Python."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(80, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(8) + float(numpy.random.rand()) + random.random()
        return self.x[index] + 0.1 * noise, (self.x[index, 0] > 0).long()


def main(folder: str, workers: int, kill_at: int = 0) -> tuple[list[str], int]:
    """Return the digests of the final weights, and how many batches were trained on."""
    torch.set_num_threads(1)
    batches = 0
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    data = DataLoader(
        Noisy(), batch_size=8, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(7)
    )

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    options: dict[str, Any] = {
        "epochs": 3, "loss_function": loss, "schedule": "cosine", "checkpoint": folder, "checkpoint_every": 3,
        "weight_decay": 0.01, "seed": 11, "metric": "accuracy",
    }  # fmt: skip
    passes = [
        P.MaskWeights(0.3), P.Train(data, learning_rate=0.02, **options), P.PruneChannels(0.25),
        P.Train(data, optimiser="sgd", learning_rate=0.05, **options),
    ]  # fmt: skip
    x = torch.randn(4, 8)
    compact = fxc.compile(model, passes, x, validation=[(Noisy().x, (Noisy().x[:, 0] > 0).long())])
    return [digest_of(tensor) for tensor in compact.state_dict().values()], batches


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
