"""Quantize: from a float graph to 8-bit kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.errors import UnsupportedError
from fxcompress.graph.metadata import Stage
from fxcompress.passes.calibrate import Calibrate
from fxcompress.passes.convert_observed import ConvertObserved
from fxcompress.passes.fuse_activation import FuseActivation
from fxcompress.passes.insert_observers import InsertObservers, ObserverOptions
from fxcompress.passes.lower import Lower
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult, data_field


@dataclass(frozen=True)
class Quantize(ObserverOptions):
    """Quantise after training: FuseActivation, InsertObservers, Calibrate, ConvertObserved, Lower.

    Args:
        calibration: inputs to measure the values on, see `Calibrate`; None takes what was given to
            `fxcompress.compile(calibration=...)`.
        activation, weight, reduced_range, ignore, weight_bits, activation_bits, mode, dynamic, weight_only,
            attention, correct_bias, qconfig: see `InsertObservers`. Modes "dynamic" and "weight-only" need no
            calibration.
        batches: how many batches of the calibration data to take at most.
    """

    calibration: Any = data_field()
    batches: int | None = None
    correct_bias: bool = True

    name: ClassVar[str] = "quantize"
    produces: ClassVar[Stage | None] = Stage.LOWERED
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def parts(self) -> tuple[Pass, ...]:
        """Return the passes of this group, in order."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(ObserverOptions)}
        observers = InsertObservers(**shared, correct_bias=self.correct_bias)
        return (FuseActivation(), observers, Calibrate(self.calibration, self.batches), ConvertObserved(), Lower())

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """A group is run part by part."""
        raise UnsupportedError("Quantize stands for several passes: run it with a PassManager, or run its parts()")
