"""What a pass is: `Pass`, `PassResult`, `Note` and the context that a pass runs in."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.errors import InputError, OptionError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage

if TYPE_CHECKING:
    from fxcompress.analysis.schedule import Way


class Contract(enum.Enum):
    """What a pass promises about the function that the graph computes."""

    EXACT = "exact"  #: the same function, up to rounding; checked after the pass
    APPROXIMATE = "approximate"  #: a function close to the one before
    TRAINS = "trains"  #: the numbers change, the graph does not

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Note:
    """One line of the ledger: what happened to a layer or node, or why nothing did.

    layer: dotted path of the layer in the caller's model, or the name of the node.
    text: for example "pruned 64 -> 32", "not pruned: output of the model", "int8", "float: input of softmax".
    """

    layer: str
    text: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.text}"


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    graph_module: the graph after the pass (the one it was given, edited in place, or another).
    modified: whether anything changed. False promises a graph that prints byte-identically and equal parameters.
    edits: number of rewrites done, in the unit of the pass (channels, nodes, pairs, ...).
    notes: the ledger of the pass.
    metrics: figures worth a place in the report, e.g. {"loss": [0.5, 0.3]}.
    """

    graph_module: fx.GraphModule
    modified: bool
    edits: int = 0
    notes: tuple[Note, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    """A whole model, and where in it the graph stands that a pass works on.

    graph_module: of the whole model. inputs: its example inputs. path: of the graph within it, "" for itself.
    """

    graph_module: fx.GraphModule
    inputs: ExampleInputs
    path: str = ""


@dataclass
class PassContext:
    """What a pass may use besides the graph.

    example_inputs: the inputs that the model was traced with.
    resources: data given to `compile`, by name: "calibration", "train_data".
    target: "cpu" or "cuda".
    dtype: what a GPU shall compute with, where the passes do not say: "fp16", "bf16", "int8" or "fp8".
    reference: the captured float graph before the first pass (the default teacher of `Distill`), when it was kept.
    progress: called as progress(description, done, total) during long work.
    model: the caller's model, which no pass changes, where it is known.
    whole: the model around the graph, where a pass runs on a region of it (see `around`).
    runs: how often passes have asked for a name of their own, see `run_name`.
    """

    example_inputs: ExampleInputs
    resources: dict[str, Any] = field(default_factory=dict)
    target: str = "cpu"
    reference: fx.GraphModule | None = None
    progress: Callable[[str, int, int | None], None] = lambda description, done, total: None
    model: nn.Module | None = None
    whole: Whole | None = None
    runs: dict[str, int] = field(default_factory=dict)
    dtype: str | None = None

    def run_name(self, pass_name: str) -> str:
        """Return a name for one run of a pass, "train-1", "train-2": the same for the same run of the same pipeline.

        Passes that keep files ask for it, once in every run; it counts on through groups of passes and repetitions.
        """
        self.runs[pass_name] = self.runs.get(pass_name, 0) + 1
        return f"{pass_name}-{self.runs[pass_name]}"

    def around(self, graph_module: fx.GraphModule) -> Whole:
        """Return the whole model that a graph is a piece of: the graph itself, unless it is a region."""
        return self.whole or Whole(graph_module, self.example_inputs)

    def resource(self, given: Any, name: str, pass_name: str) -> Any:
        """Return `given`, or the resource of that name if `given` is None.

        Raises:
            InputError: there is neither.
        """
        found = given if given is not None else self.resources.get(name)
        if found is None:
            raise InputError(
                f"{pass_name} needs data: give it to the pass ({name}=...) or to fxcompress.compile({name}=...)"
            )
        return found


@dataclass(frozen=True)
class Piece:
    """A graph to run passes on, the whole model or a region of it, with the context for it."""

    graph_module: fx.GraphModule
    context: PassContext

    @property
    def path(self) -> str:
        """Where it stands in the whole model, "" for the model itself."""
        return self.context.whole.path if self.context.whole is not None else ""


@dataclass(frozen=True)
class Pass:
    """Base class of every pass. Subclass it as a frozen dataclass; its fields are its options.

    Class attributes:
        name: its word in pipeline text, e.g. "remove-channels".
        requires: the stages it takes.
        produces: the stage it leaves, or None for the one it was given.
        contract: what it promises about the function that the graph computes.
        whole: whether it runs the model on data, so that a model with regions (`graph.regions`) is one piece to it.
            Every other pass is run on the graph and on each region by itself.

    A field whose metadata has `data=True` (see `data_field`) holds what cannot be written as text: tensors, loaders,
    functions.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    produces: ClassVar[Stage | None] = None
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    whole: ClassVar[bool] = False

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Transform the graph. The graph may be edited in place: the manager owns it."""
        raise NotImplementedError(f"{type(self).__name__} must define run()")

    @property
    def joins(self) -> bool:
        """Whether the pass decides something over all pieces of a model together (see `decide`)."""
        return False

    def decide(self, pieces: Sequence[Piece]) -> Sequence[Pass]:
        """Return the pass to run on each piece of a model. Asked only of passes that join pieces; changes nothing."""
        return [self for _ in pieces]

    def parts(self) -> tuple[Pass, ...]:
        """Return the passes that this one stands for: itself, unless it is a group of passes."""
        return (self,)

    def on_the_way(self, way: Way) -> Pass | None:
        """Return the pass that goes a part of the way that this one goes, for pruning in steps (`Iterate`).

        None, unless a subclass says otherwise: a pass that has no amount, and runs once.
        """
        return None

    def __str__(self) -> str:
        from fxcompress.pipeline.text import print_pass

        return print_pass(self)


def data_field(default: Any = None) -> Any:
    """A dataclass field for data: left out of pipeline text and of comparisons."""
    return dataclasses.field(default=default, metadata={"data": True}, compare=False, repr=False)


def check_fraction(pass_name: str, option: str, value: float) -> None:
    """Raise `OptionError` unless 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise OptionError(f"{pass_name}: {option} must be at least 0 and below 1, not {value!r}")


def check_choice(pass_name: str, option: str, value: object, allowed: Iterable[object], others: str = "") -> None:
    """Raise `OptionError` unless `value` is one of `allowed`; `others` says in words what else could be given."""
    choices = list(allowed)
    if value not in choices:
        known = f"{', '.join(map(repr, choices))}{others and f', {others}'}"
        raise OptionError(f"{pass_name}: {option} must be one of {known}, not {value!r}")


def parameters_equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same names and the same numbers, bit for bit (NaN equal to NaN)."""
    return before.keys() == after.keys() and all(
        before[name].shape == after[name].shape
        and before[name].dtype == after[name].dtype
        and torch.equal(before[name].nan_to_num(), after[name].nan_to_num())
        for name in before
    )
