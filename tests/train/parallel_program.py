"""A pipeline of everything that needs data, run by test_processes.py in one process and in two.

Usage, once for each process, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set:
parallel_program.py FOLDER all|training RANK_TO_KILL BATCH_TO_DIE_AT
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress import processes
from fxcompress.errors import PassError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline.base import PassContext
from fxcompress.quant.observers import ChannelMean
from fxcompress.train.data import digest_of


def model(norm: bool) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(54, 3, 8, 8, generator=generator)
    return TensorDataset(images, (images.mean((1, 2, 3)) > 0).long() + 2 * (images[:, 0].std((1, 2)) > 1).long())


def decisions() -> dict[str, Any]:
    """Return the channels that criteria choose, and the scales that observers propose.

    The batches of the second process are much unlike those of the first.
    """
    data = dataset()
    x = data.tensors[0][:2]
    for start in range(9, 54, 18):
        data.tensors[0][start : start + 9] = 4.0 * data.tensors[0][start : start + 9, [0]].abs()
    pairs = [(data.tensors[0][i : i + 9], data.tensors[1][i : i + 9]) for i in range(0, 54, 9)]
    found: dict[str, Any] = {"channels": {}, "scales": {}}
    for importance in ("taylor", "activation", "hessian"):
        pruned = fxc.compile(model(True), [P.PruneChannels(0.5, importance=importance, data=pairs)], x)
        found["channels"][importance] = digest_of(pruned.get_parameter("3.weight"))
    for name in ("histogram", "minmax", "percentile", "moving-average"):
        passes = [P.Fuse(), P.FuseActivation(), P.InsertObservers(activation=name), P.Calibrate(pairs)]
        observers: list[Any] = list(fxc.compile(model(True), passes, x).get_submodule("observers").children())
        proposed = [one.calculate_qparams() for one in observers if not isinstance(one, ChannelMean)]
        found["scales"][name] = [[scale.tolist(), zero_point.tolist()] for scale, zero_point in proposed]
    train = P.Train(pairs, epochs=2, optimiser="sgd")
    for learned in (True, False):
        quantised = fxc.compile(model(True), [P.QAT(train, learn_steps=learned)], x, calibration=pairs)
        found[f"qat {learned}"] = [digest_of(tensor) for tensor in quantised.state_dict().values()]
    return found


def training(folder: str, victim: int = -1, at: int = 0) -> dict[str, Any]:
    """Return weights and figures of two trainings, with and without batch norm; a process may die in the middle."""
    data = dataset()
    loader = DataLoader(data, batch_size=8, shuffle=True)
    batches = 0

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if processes.rank() == victim and batches == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    found: dict[str, Any] = {}
    for name, norm in (("plain", False), ("norm", True)):
        train = P.Train(
            loader, epochs=3, optimiser="sgd", learning_rate=0.05, loss_function=loss, metric="accuracy",
            checkpoint=f"{folder}/{name}", checkpoint_every=3, accumulate=2,
        )  # fmt: skip
        trained = fxc.compile(model(norm), [train], data.tensors[0][:2], validation=[data.tensors])
        assert trained.report is not None
        found[name] = {
            "weights": [tensor.tolist() for tensor in trained.state_dict().values()],
            "digest": [digest_of(tensor) for tensor in trained.state_dict().values()],
            "metrics": {**trained.report.passes[-1].metrics, "epoch_seconds": None},
        }
    trained.save(f"{folder}/model.fxc")
    return {**found, "batches": batches}


def sampled() -> dict[str, Any]:
    """Return the weights of a training whose data the user shares among the processes."""
    data, count = dataset(), processes.count()
    sampler: DistributedSampler[Any] = DistributedSampler(data, count, processes.rank(), shuffle=False, drop_last=True)
    loader = DataLoader(data, batch_size=8 // count, sampler=sampler, drop_last=True)
    trained = fxc.compile(model(False), [P.Train(loader, epochs=2, optimiser="sgd")], data.tensors[0][:2])
    return {"sampled": [tensor.tolist() for tensor in trained.state_dict().values()]}


class Stop(Exception):
    """Ends a training from inside, in every process."""


def split(folder: str, stop: int = 0) -> dict[str, Any]:
    """Return weights and figures of a training of masked weights that are split over the processes.

    It may be interrupted after some batches, and goes on then.
    """
    data = dataset()
    loader = DataLoader(TensorDataset(data.tensors[0][:49], data.tensors[1][:49]), batch_size=8, shuffle=True)
    batches = 0

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == stop:
            raise Stop
        return F.cross_entropy(output, target)

    train = P.Distill(
        loader, epochs=3, optimiser="adamw", weight_decay=0.1, learning_rate=0.01, clip=0.5, loss_function=loss,
        metric="accuracy", shard=True, checkpoint=f"{folder}/split", checkpoint_every=2, match="logits",
    )  # fmt: skip
    manager = fxc.PassManager([P.MaskWeights(0.3), train])
    context = PassContext(ExampleInputs.of(data.tensors[0][:2]), {"validation": [data.tensors]})
    graph = fxc.trace(model(False), data.tensors[0][:2])
    if stop:
        with contextlib.suppress(PassError):
            manager.run(graph, data.tensors[0][:2], dataclasses.replace(context, runs={}))
        assert batches == stop
    result = manager.run(graph, data.tensors[0][:2], context)
    trained = result.graph_module
    return {
        "weights": [tensor.tolist() for tensor in trained.state_dict().values()],
        "types": sorted({type(parameter).__name__ for parameter in trained.parameters()}),
        "class": type(trained).__mro__[1].__name__,
        "metrics": {**result.rows[-1].metrics, "epoch_seconds": None},
        "masked": sum(int((parameter == 0).sum()) for parameter in trained.parameters()),
    }


def main(folder: str, what: str, victim: int, at: int) -> None:
    torch.set_num_threads(1)
    found = training(folder, victim, at)
    if what == "all":
        found |= decisions() | sampled()
        found |= {"split": split(f"{folder}/whole"), "split in two": split(f"{folder}/parts", stop=11)}
    Path(f"{folder}/rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
