"""Calibrate: data through the observers."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress import processes
from fxcompress.errors import InputError
from fxcompress.graph.batches import read_batches
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage
from fxcompress.graph.shapes import evaluation
from fxcompress.passes.insert_observers import observe_values, observers_of
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult, data_field, parameters_equal
from fxcompress.quant.merging import can_merge, merge_over_processes
from fxcompress.quant.unobserved import Unobserved
from fxcompress.train.data import is_shared


@dataclass(frozen=True)
class Calibrate(Pass):
    """Run data through a graph with observers, in evaluation mode and without gradients.

    The observers forget what they have seen before, so the statistics are those of this data alone, and a second run
    on the same data changes nothing. Of several processes each runs a part of the batches, and all get the statistics
    of the whole; or each runs all of them, where statistics depend on the order ("moving-average") or come from
    observers from elsewhere.
    Fake-quantisers that training has started with keep what they have. Where weights alone are observed, as dynamic and
    weight-only layers have it, no data is needed.

    Args:
        calibration: batches of inputs; None takes what was given to `fxcompress.compile(calibration=...)`, or else the
            inputs of `fxcompress.compile(train_data=...)`. One of:
            a tensor of samples; for one batch a tuple of the model's positional inputs or a dict of its keyword inputs;
            an iterable of batches, a DataLoader for example, where each batch is a tensor, a tuple of inputs, possibly
            with a target behind them, which is left out, or a dict of keyword inputs.
        batches: how many batches to take at most; None takes all.
    """

    calibration: Any = data_field()
    batches: int | None = None

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})
    contract: ClassVar[Contract] = Contract.EXACT
    whole: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Record, and compare the statistics with those before."""
        found = observers_of(graph_module).items()
        observers = {
            path: observer for path, observer in found
            if not isinstance(observer, Unobserved) and not getattr(observer, "quantizing", False)
        }  # fmt: skip
        if not observers:
            return PassResult(graph_module, modified=False)
        known = (self.calibration, context.resources.get("calibration"), context.resources.get("train_data"))
        data = next((one for one in known if one is not None), None)
        if not observe_values(graph_module):
            data = [context.example_inputs]  # weights are the same whatever comes in
        data = context.resource(data, "calibration", "Calibrate")
        before = {path: _statistics(observer) for path, observer in observers.items()}
        total = len(data) if isinstance(data, Sized) and not isinstance(data, (torch.Tensor, tuple, Mapping)) else None
        count = 0
        shared = is_shared(data) and can_merge(observers)
        try:
            for observer in observers.values():
                observer.reset()
                observer.recording = True
            with evaluation(graph_module), torch.no_grad():
                for count, batch in enumerate(read_batches(data, context.example_inputs), start=1):
                    if not shared or (count - 1) % processes.count() == processes.rank():
                        _run(graph_module, batch, count)
                    context.progress("calibrate", count, total)
                    if count == self.batches:
                        break
        finally:
            for observer in observers.values():
                observer.recording = False
        if shared:
            merge_over_processes(observers)
        if count == 0:
            raise InputError("the calibration data is empty: it yields no batch")
        edits = sum(not parameters_equal(before[path], _statistics(observer)) for path, observer in observers.items())
        return PassResult(graph_module, edits > 0, edits, metrics={"batches": count})


def _statistics(observer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in observer.state_dict().items()}


def _run(graph_module: fx.GraphModule, batch: ExampleInputs, number: int) -> None:
    try:
        batch.call(graph_module)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"calibration batch {number} ({batch.describe()}) does not fit the model: {reason}") from error
