"""InsertObservers: observers where 8-bit layers will want numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx, nn

from fxcompress.analysis.layers import matching_layers
from fxcompress.analysis.quantization import Anchor, GridGroup, QuantizationPlan, plan_quantization
from fxcompress.errors import OptionError, did_you_mean
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import Stage, set_info
from fxcompress.graph.regions import regions
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult, data_field
from fxcompress.quant.cpu import cpu_features
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.observers import OBSERVERS, ChannelMean, ExternalObserver, Observer
from fxcompress.quant.qconfig import Chooser, ObserverChoice, chooser
from fxcompress.quant.spec import REDUCED_WEIGHT, WEIGHT

_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.Linear: F.linear,
}


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Put observers on the weights of convolutions and linear layers, and on the values that 8-bit kernels will read.

    1. What becomes 8-bit is decided by `analysis.quantization`; the ledger has the reason for every layer and node that
       stays float.
    2. A layer becomes a function of an explicit weight, `F.conv2d(x, observer(conv1.weight), ...)`, so that observed,
       trained and quantised graphs have one shape and gradients reach the weight. The weight keeps its path.
    3. There is no observer between a layer and the activation or residual add that its kernel computes as well
       (`FuseActivation` marks them); the observer stands behind the last of them.
    4. Values that are joined or moved only (cat, reshape, max pooling, ...) share one observer.
    5. In front of each such layer stands a `ChannelMean`, from which `ConvertObserved` corrects the bias.
    6. Observers return what they are given, so the graph computes what it did before.

    Args:
        activation: observer of values: "histogram", "minmax", "moving-average" or "percentile"; or an observer class of
            `fxcompress.quant.observers` or of `torch.ao`, or a function that makes one.
        weight: the same for weights; "per-channel" by default.
        reduced_range: weights in [-64, 64], which sums without saturation on CPUs without VNNI. None: if this machine
            needs it.
        ignore: layers that stay float, as dotted paths or patterns ("features.0", "head.*").
        qat: whether to put trainable fake-quantisers in the place of plain observers.
        correct_bias: whether biases shall make up for what rounding the weights changes on average. Not with `qat`,
            where training does it.
        qconfig: a `QConfig` or `QConfigMapping` of `torch.ao`, in the place of `activation` and `weight`.
    """

    activation: Any = "histogram"
    weight: Any = "per-channel"
    reduced_range: bool | None = None
    ignore: tuple[str, ...] = ()
    qat: bool = False
    correct_bias: bool = True
    qconfig: Any = data_field()

    name: ClassVar[str] = "insert-observers"
    produces: ClassVar[Stage | None] = Stage.OBSERVED
    contract: ClassVar[Contract] = Contract.EXACT

    def __post_init__(self) -> None:
        check_observer_options(self)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Plan, then insert."""
        reduced = not cpu_features().vnni if self.reduced_range is None else self.reduced_range
        default = ObserverChoice(self.activation, self.weight, REDUCED_WEIGHT if reduced else WEIGHT)
        choose = chooser(self.qconfig, default)
        ignored = matching_layers(graph_module, self.ignore)

        def accepts(path: str, module: nn.Module) -> str | None:
            if path in ignored:
                return "ignored on request"
            return None if choose(path, module) else "no QConfig for it"

        plan = plan_quantization(graph_module, accepts)
        edits = _Insertion(graph_module, plan, choose, self.qat, self.correct_bias and not self.qat).run()
        notes = [Note(name, f"float: {reason}") for name, reason in plan.reasons.items()]
        if reduced and plan.anchors:
            notes.append(Note("target cpu", "weights in 7 bits: without VNNI, sums of products of 8 bits saturate"))
        return PassResult(graph_module, edits > 0, edits, tuple(notes))


def check_observer_options(item: object) -> None:
    """Check the options that `InsertObservers` and `Quantize` share."""
    for option in ("activation", "weight"):
        given = getattr(item, option)
        if isinstance(given, str) and given not in OBSERVERS:
            raise OptionError(f"{type(item).__name__}: there is no observer {given!r}{did_you_mean(given, OBSERVERS)}")
    activation, ignore = getattr(item, "activation"), getattr(item, "ignore")  # noqa: B009 - fields of either class
    if activation == "per-channel":
        raise OptionError(f"{type(item).__name__}: values have one scale each, so activation='per-channel' cannot be")
    object.__setattr__(item, "ignore", (ignore,) if isinstance(ignore, str) else tuple(ignore))


class _Insertion:
    """Applies a plan to a graph."""

    def __init__(
        self, graph_module: fx.GraphModule, plan: QuantizationPlan, choose: Chooser, qat: bool, correct_bias: bool
    ) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.plan = plan
        self.choose = choose
        self.qat = qat
        self.correct_bias = correct_bias
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.container = edit.unique_path(graph_module, "observers")
        self.layers = {anchor.path: graph_module.get_submodule(anchor.path) for anchor in plan.anchors}
        self.weights: dict[str, fx.Node] = {}  # path of a layer -> its observed weight
        self.means: dict[str, ChannelMean] = {}  # path of a layer -> the means of its input
        self.paths: dict[nn.Module, str] = {}  # of the observers

    def run(self) -> int:
        """Return how many observers were inserted."""
        for anchor in self.plan.anchors:
            self._make_functional(anchor)
        for group in self.plan.groups:
            self._observe(group)
        return len(self.paths)

    def _make_functional(self, anchor: Anchor) -> None:
        node, layer = self.nodes[anchor.node], self.layers[anchor.path]
        with self.graph.inserting_before(node):
            bias = None
            if layer.bias is not None:
                bias = self.graph.get_attr(f"{anchor.path}.bias")
                set_info(bias, layer=anchor.path)
            if anchor.path not in self.weights:
                self.weights[anchor.path] = self._observed_weight(anchor.path)
            value = self._averaged(node.args[0], anchor.path)
        function: ops.Function = _FUNCTIONS[type(layer)]
        bound: dict[str, Any] = {"input": value, "weight": self.weights[anchor.path], "bias": bias}
        if not isinstance(layer, nn.Linear):
            bound |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        node.op, node.target = "call_function", function
        node.args, node.kwargs = ops.canonical_arguments(ops.BY_FUNCTION[function], bound)

    def _averaged(self, value: Any, path: str) -> Any:
        """The input of a layer, behind its `ChannelMean` if there shall be one."""
        if not self.correct_bias:
            return value
        if path not in self.means:
            layer: Any = self.layers[path]
            linear = isinstance(layer, nn.Linear)
            channels, axis = (layer.in_features, -1) if linear else (layer.in_channels, 1 - layer.weight.ndim)
            self.means[path] = ChannelMean(channels, axis)
        averaged = self._call(f"{path.replace('.', '_')}_input", self.means[path], value)
        set_info(averaged, layer=path)
        return averaged

    def _observed_weight(self, path: str) -> fx.Node:
        weight = self.graph.get_attr(f"{path}.weight")
        observer = self._choice(path).weight_observer()
        observed = self._call(f"{path.replace('.', '_')}_weight", observer, weight)
        for node in (weight, observed):
            set_info(node, layer=path)
        return observed

    def _observe(self, group: GridGroup) -> None:
        observer = self._choice(group.layer).activation_observer()
        for name in group.values:
            value = self.nodes[name]
            readers = list(value.users)
            with self.graph.inserting_after(value):
                observed = self._call(group.name, observer, value)
            for reader in readers:
                reader.replace_input_with(value, observed)

    def _choice(self, path: str) -> ObserverChoice:
        choice = self.choose(path, self.layers[path])
        if choice is None:  # the plan holds layers with a choice only
            raise OptionError(f"no observers were chosen for layer {path!r}")
        return choice

    def _call(self, name: str, observer: nn.Module, value: fx.Node) -> fx.Node:
        """Call an observer, which gets a path at its first call."""
        if observer not in self.paths:
            self.paths[observer] = edit.unique_path(self.graph_module, f"{self.container}.{name}")
            module = observer
            if self.qat and isinstance(observer, (Observer, ExternalObserver)):
                module = FakeQuantize(observer)
            edit.add_module(self.graph_module, self.paths[observer], module)
        return self.graph.call_module(self.paths[observer], (value,))


def observers_of(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Return the observers that a graph and its regions call, by path."""
    graphs = {"": graph_module, **{f"{region.path}.": region.graph_module for region in regions(graph_module)}}
    found = {
        f"{prefix}{node.target}": ops.submodule(node)
        for prefix, graph in graphs.items() for node in graph.graph.nodes if node.op == "call_module"
    }  # fmt: skip
    return {path: module for path, module in found.items() if is_observer(module)}


def is_observer(module: object) -> bool:
    """Whether a module is one of those that `InsertObservers` puts in."""
    return isinstance(module, (Observer, ExternalObserver, FakeQuantize, ChannelMean))
