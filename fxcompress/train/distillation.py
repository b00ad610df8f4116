"""Knowledge distillation: losses between a student and a teacher, and values from inside of both.

- Softened outputs: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
- Features behind learned projections: Romero et al., FitNets: Hints for Thin Deep Nets, 2015.
- Attention maps: Zagoruyko and Komodakis, Paying More Attention to Attention, 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_map

from fxcompress.errors import FxCompressError, InputError, OptionError, did_you_mean
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import info
from fxcompress.graph.shapes import evaluation
from fxcompress.train.data import Batch
from fxcompress.train.losses import Loss
from fxcompress.train.objectives import pick, require_scalar, widened


@dataclass(frozen=True)
class Pair:
    """The names of one value in the student and in the teacher. Prints as "layer1:stages.0", or one name for both."""

    student: str
    teacher: str

    @classmethod
    def of(cls, text: str) -> Pair:
        """Read "name" or "name:name of the teacher"."""
        student, _, teacher = text.partition(":")
        return cls(student, teacher or student)


@dataclass(frozen=True)
class Matching:
    """What the student shall have like the teacher, and how much it counts; see `fxcompress.passes.Distill`."""

    alpha: float = 0.5
    temperature: float = 4.0
    match: str = "logits"
    features: tuple[Pair, ...] = ()
    feature_weight: float = 1.0
    attention: tuple[Pair, ...] = ()
    attention_weight: float = 1000.0
    output: int | str | None = None


# Losses


def softened_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 times the mean Kullback-Leibler divergence of the student's softmax(x / T) from the teacher's.

    The factor keeps its gradients as large as those of a loss on labels, whatever T is. Logits have shape
    (n, classes, ...) or, for sequences, (n, length, classes).
    """
    axis = -1 if student.ndim == 3 else 1
    ours = F.log_softmax(student / temperature, dim=axis)
    theirs = F.log_softmax(teacher / temperature, dim=axis)
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis).mean()


def attention_map(value: torch.Tensor) -> torch.Tensor:
    """Return where a layer looks: squares added over the channels, of length 1 for each sample; shape (n, positions).

    Channels are the last dimension of sequences (n, length, channels), and dimension 1 of everything else.
    """
    squares = value.square().sum(-1 if value.ndim == 3 else 1)
    return F.normalize(squares.flatten(1), dim=1)


def attention_difference(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of two attention maps, as the authors' own program takes it."""
    return (attention_map(student) - attention_map(teacher)).square().mean()


class Projection(nn.Module):
    """A learned linear map of one dimension, which makes a student's feature as wide as its teacher's.

    For images it is a 1x1 convolution. Features of one shape are handed on.
    """

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, names: Pair) -> None:
        super().__init__()
        ours, theirs = tuple(student.shape), tuple(teacher.shape)
        others = [axis for axis in range(1, len(ours)) if len(ours) == len(theirs) and ours[axis] != theirs[axis]]
        if len(ours) != len(theirs) or len(ours) < 2 or len(others) > 1:
            raise InputError(
                f"features {names.student!r} of the student, of shape {ours}, and {names.teacher!r} of the teacher, of "
                f"shape {theirs}, must have one shape but for the number of channels"
            )
        self.axis = others[0] if others else None
        self.linear = (
            nn.Linear(ours[others[0]], theirs[others[0]], bias=False, device=student.device) if others else None
        )

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return the projected feature."""
        if self.linear is None or self.axis is None:
            return value
        projected: torch.Tensor = self.linear(value.movedim(self.axis, -1)).movedim(-1, self.axis)
        return projected


# Values from inside


class Tapped:
    """Runs a model and returns its output together with values from inside it.

    A name is that of a node or of a layer of the caller's model, whose last value is taken, in a graph; in any other
    module it is the path of a submodule.

    Args:
        module: shares its tensors and layers with what is run here.
        names: of the values. whose: "student" or "teacher", for messages.

    Raises:
        OptionError: there is no such name; the nearest one is suggested.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], whose: str) -> None:
        self.module, self.whose = module, whose
        self.hooked: list[str] = []
        nodes: list[fx.Node] = []
        graph_module = module if isinstance(module, fx.GraphModule) else None
        for name in dict.fromkeys(names):
            node = find_node(graph_module, name) if graph_module is not None else None
            if node is not None:
                nodes.append(node)
            elif name and name in dict(module.named_modules()):
                self.hooked.append(name)
            else:
                raise OptionError(f"the {whose} has no layer or node {name!r}{did_you_mean(name, known_names(module))}")
        self.names = [name for name in dict.fromkeys(names) if name not in self.hooked]
        self.run = _with_values(graph_module, nodes) if graph_module is not None and nodes else module

    def __call__(self, inputs: ExampleInputs) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return the output, and the values by name.

        Raises:
            InputError: a layer was not run, or its value is not one tensor.
        """
        found: dict[str, Any] = {}
        handles = [
            self.module.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: found.update({name: output})
            )
            for name in self.hooked
        ]
        try:
            output = inputs.call(self.run)
        finally:
            for handle in handles:
                handle.remove()
        if self.run is not self.module:
            output, values = output
            found.update(zip(self.names, values, strict=True))
        for name in (*self.names, *self.hooked):
            if not isinstance(found.get(name), torch.Tensor):
                what = f"gives a {type(found[name]).__name__}, not a tensor" if name in found else "was not run"
                raise InputError(f"{name!r} of the {self.whose} {what}; name another layer or node")
        return output, {name: widened(value) for name, value in found.items()}


def find_node(graph_module: fx.GraphModule, name: str) -> fx.Node | None:
    """Return the node of that name, or the one that gives the value of that layer of the caller's model."""
    nodes: list[fx.Node] = [node for node in graph_module.graph.nodes if node.op not in ("output", "get_attr")]
    exact = next((node for node in nodes if node.name == name), None)
    if exact is not None and exact.op != "placeholder":
        return exact
    of_layer = [node for node in nodes if f"{info(node).layer}.".startswith(f"{name}.")]
    return of_layer[-1] if of_layer else exact


def known_names(module: nn.Module) -> list[str]:
    """Return the names that `Tapped` understands."""
    if not isinstance(module, fx.GraphModule):
        return [name for name, _ in module.named_modules() if name]
    nodes = [node for node in module.graph.nodes if node.op not in ("output", "get_attr", "placeholder")]
    return sorted({node.name for node in nodes} | {info(node).layer for node in nodes if info(node).layer})


def _with_values(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """Return a graph of the same layers and tensors that returns (output, values of the nodes)."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, twins)
    graph.output((output, tuple(twins[node] for node in nodes)))
    return fx.GraphModule(graph_module, graph)


# The objective


class Distillation:
    """The loss of a student that has a teacher.

    Args:
        student: the graph that trains. teacher: any module; it runs where its parameters are, without gradients, and
            must be in evaluation mode.
        matching: what shall be alike.
        loss: of output and target; not asked where `matching.alpha` is 1.
        by_name: whether the loss is one of the project's, which want a single tensor as output.
        example: inputs that fit both.

    Raises:
        InputError: outputs or features of the two do not fit together.
        OptionError: a name is not known.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        matching: Matching,
        loss: Loss,
        by_name: bool,
        example: ExampleInputs,
    ) -> None:
        self.matching, self.loss, self.by_name = matching, loss, by_name
        inside = (*matching.features, *matching.attention)
        self.student = Tapped(student, [pair.student for pair in inside], "student")
        self.teacher = Tapped(teacher, [pair.teacher for pair in inside], "teacher")
        self.looks_inside = bool(inside)
        self.teacher_device = next((p.device for p in teacher.parameters()), None)
        with evaluation(student), torch.no_grad():
            ours, theirs = self.student(example), self._ask_once(example)
        self._require_same_outputs(ours[0], theirs[0])
        self.helper: nn.Module | None = None
        if matching.features:
            self.helper = nn.ModuleList(
                Projection(ours[1][pair.student], theirs[1][pair.teacher], pair) for pair in matching.features
            )
        for pair in matching.attention:
            _require_same_positions(ours[1][pair.student], theirs[1][pair.teacher], pair)

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the weighted sum of all parts of the loss."""
        if batch.inputs is None:
            raise InputError("distillation needs batches of inputs")
        output, ours = self.student(batch.inputs) if self.looks_inside else (batch.inputs.call(module), {})
        output = tree_map(widened, output)
        expected, theirs = self._ask(batch.inputs)
        matching = self.matching
        total = torch.zeros((), device=batch.inputs.tensors()[0].device)
        if matching.alpha > 0:
            total = total + matching.alpha * self._difference(self._pick(output), self._pick(expected))
        if matching.alpha < 1:
            value = self.loss(self._pick(output) if self.by_name else output, batch.target)
            total = total + (1 - matching.alpha) * require_scalar(value)
        projections = self.helper if isinstance(self.helper, nn.ModuleList) else ()
        for pair, projection in zip(matching.features, projections, strict=True):
            value = F.mse_loss(projection(ours[pair.student]), theirs[pair.teacher])
            total = total + matching.feature_weight * value
        for pair in matching.attention:
            value = attention_difference(ours[pair.student], theirs[pair.teacher])
            total = total + matching.attention_weight * value
        return require_scalar(total)

    def _ask(self, inputs: ExampleInputs) -> tuple[Any, dict[str, torch.Tensor]]:
        """Run the teacher, and bring what it says to the student's device."""
        home = inputs.tensors()[0].device
        with torch.no_grad():
            output, values = self.teacher(inputs.map(lambda tensor: tensor.to(self.teacher_device or home)))

        def back(leaf: Any) -> Any:
            return widened(leaf).to(home) if isinstance(leaf, torch.Tensor) else leaf

        return tree_map(back, output), {name: back(value) for name, value in values.items()}

    def _ask_once(self, example: ExampleInputs) -> tuple[Any, dict[str, torch.Tensor]]:
        """Run the teacher on the example inputs, and tell why if it does not."""
        try:
            return self._ask(example)
        except FxCompressError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"the teacher ({type(self.teacher.module).__name__}) does not run on the inputs of the student "
                f"({example.describe()}): {type(error).__name__}: {reason}"
            ) from error

    def _difference(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if self.matching.match == "values":
            return F.mse_loss(ours, theirs)
        return softened_divergence(ours, theirs, self.matching.temperature)

    def _pick(self, output: Any) -> torch.Tensor:
        return pick(output, self.matching.output)

    def _require_same_outputs(self, ours: Any, theirs: Any) -> None:
        student, teacher = self._pick(ours), self._pick(theirs)
        if student.shape != teacher.shape:
            raise InputError(
                f"the teacher's output has shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}: they "
                f"must be the same; choose one of several outputs with output=..., or give another teacher"
            )
        classes = student.shape[-1 if student.ndim == 3 else 1] if student.ndim > 1 else 1
        if self.matching.match == "logits" and classes < 2:
            raise InputError(
                f"an output of shape {tuple(student.shape)} has no classes to compare as logits; give match='values'"
            )


def _require_same_positions(student: torch.Tensor, teacher: torch.Tensor, names: Pair) -> None:
    ours, theirs = (tuple(value.shape) for value in (student, teacher))
    if len(ours) < 3 or len(ours) != len(theirs) or attention_map(student).shape != attention_map(teacher).shape:
        raise InputError(
            f"attention of {names.student!r} of the student, of shape {ours}, and {names.teacher!r} of the teacher, of "
            f"shape {theirs}, must have positions, and the same ones"
        )
