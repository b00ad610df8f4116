"""QAT: from a float graph to 8-bit kernels, with training in between."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.errors import OptionError, UnsupportedError
from fxcompress.graph.metadata import Stage
from fxcompress.passes.calibrate import Calibrate
from fxcompress.passes.convert_observed import ConvertObserved
from fxcompress.passes.insert_observers import InsertObservers, ObserverOptions
from fxcompress.passes.lower import Lower
from fxcompress.passes.train import Train
from fxcompress.pipeline.base import Contract, Pass, PassContext, PassResult, data_field
from fxcompress.pipeline.presets import read_passes


@dataclass(frozen=True)
class QAT(ObserverOptions):
    """Quantise with training: InsertObservers(qat=True), Calibrate, Train (or others), ConvertObserved, Lower.

    Batch norms may still be there: layers are trained with them as the layers they will be deployed as. The learning
    rate is usually that of fine-tuning.

    Args:
        train: what happens between observers and kernels: a pass (`P.Train(loader, epochs=3)`), several, or their text.
        calibration: inputs for the first grids, see `Calibrate`; None takes those of the first pass that trains, or
            what was given to `fxcompress.compile(calibration=...)` or `train_data=...`.
        batches: how many batches of these to take at most.
        activation, weight, reduced_range, ignore, weight_bits, activation_bits, mode, dynamic, weight_only,
            attention, learn_steps, freeze_norms, freeze_observers, qconfig: see `InsertObservers`.
    """

    train: Any = (Train(),)
    calibration: Any = data_field()
    batches: int | None = 8
    learn_steps: bool = True
    freeze_norms: float = InsertObservers.freeze_norms
    freeze_observers: float = InsertObservers.freeze_observers

    name: ClassVar[str] = "qat"
    produces: ClassVar[Stage | None] = Stage.LOWERED
    contract: ClassVar[Contract] = Contract.TRAINS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "train", tuple(read_passes(self.train)))
        if not self.train:
            raise OptionError("QAT: train must be a pass that trains, such as P.Train(loader, epochs=3)")
        self._observers()  # checks the options

    def parts(self) -> tuple[Pass, ...]:
        """Return the passes of this group, in order."""
        found = (getattr(item, "data", None) for item in self.train)
        data = (
            self.calibration if self.calibration is not None else next((one for one in found if one is not None), None)
        )
        return (self._observers(), Calibrate(data, self.batches), *self.train, ConvertObserved(), Lower())

    def _observers(self) -> InsertObservers:
        names = [field.name for field in dataclasses.fields(ObserverOptions)]
        names += ["learn_steps", "freeze_norms", "freeze_observers"]
        return InsertObservers(qat=True, **{name: getattr(self, name) for name in names})

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """A group is run part by part."""
        raise UnsupportedError("QAT stands for several passes: run it with a PassManager, or run its parts()")
