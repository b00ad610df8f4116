"""What cannot be traced stays whole or stays Python; everything around it and inside it is captured."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.emit.compact_module import CompactModule
from fxcompress.errors import ArtifactError, CaptureError
from fxcompress.graph import compare, opaque
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info, info
from fxcompress.graph.regions import regions
from fxcompress.graph.tracer import Tracer
from fxcompress.testing import assert_equivalent

PRUNE = [P.PruneChannels(0.5, scope="layer"), P.Fuse()]


class Gate(nn.Module):
    """A submodule whose control flow depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.layer(x)  # type: ignore[no-any-return]
        return -x


def by_sign(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    if x.mean() > 0:
        return x, 2
    return x * 3, 1


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(4, 8), Gate()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gate(self.first(x))
        y, factor = by_sign(self.block(y))
        y = y[y.sum(1) > -1e9]  # a shape that depends on data
        return self.last(y) * factor  # type: ignore[no-any-return]


@pytest.fixture
def around() -> Around:
    torch.manual_seed(0)
    return Around().eval()


def test_what_cannot_be_traced_is_one_node_and_the_rest_is_captured(around: Around) -> None:
    x = torch.randn(5, 4)
    traced = fxc.trace(around, x)
    for batch in (x, -x, torch.randn(7, 4)):
        assert torch.equal(traced(batch), around(batch))
    opaque = {node.name: info(node).opaque for node in traced.graph.nodes if info(node).opaque}
    assert list(opaque) == ["gate", "by_sign", "getitem_2"]
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["first", "gate", "block.0", "block.1", "block.2", "last"]


def test_the_graph_around_is_compressed_and_the_report_says_why_the_rest_is_not(around: Around) -> None:
    x = torch.randn(5, 4)
    masked = fxc.compile(around, [P.MaskChannels(0.5, scope="layer")], x)
    compact = fxc.compile(around, PRUNE, x)
    assert compact.get_parameter("block.0.weight").shape == (8, 8)
    assert compact.get_parameter("gate.layer.weight").shape == (8, 8)
    assert_equivalent(masked, compact, x)
    assert compact.report is not None
    lines = {line.layer: line for line in compact.report.layers}
    assert lines["gate"].parameters == (72, 72)
    assert "opaque: could not be traced (control flow at " in lines["gate"].notes[0]
    assert "test_capture_degrades.py:" in lines["gate"].notes[0]
    assert "(`if x.sum() > 0:`)" in lines["gate"].notes[0]
    assert "(`if x.mean() > 0:`)" in lines["by_sign"].notes[0]
    assert compact.report.after.parameters == sum(p.numel() for p in compact.parameters())


def test_a_weight_that_opaque_code_uses_too_keeps_its_shape() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()
            self.out = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.gate.layer(self.gate(x)).relu())  # type: ignore[no-any-return]

    x = torch.randn(3, 8)
    compact = fxc.compile(Shared(), PRUNE, x)
    assert compact.get_parameter("gate.layer.weight").shape == (8, 8)


def test_many_failing_modules_of_one_class_cost_few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    run = Tracer.run

    def count(self: Tracer, concrete: dict[str, Any]) -> fx.Graph:
        attempts.append(1)
        return run(self, concrete)

    monkeypatch.setattr(Tracer, "run", count)
    traced = fxc.trace(nn.Sequential(nn.Linear(8, 8), *[Gate() for _ in range(30)]).eval(), torch.randn(2, 8))
    assert sum(info(node).opaque is not None for node in traced.graph.nodes) == 30
    assert len(attempts) <= 4


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"fine": y, "coarse": nn.functional.max_pool2d(y, 2)}


class Head(nn.Module):
    """Called for every level; its method for the loss is called by Python."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 2.0
        self.tower = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 5, 1))

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.tower(level).flatten(2) for level in levels], 2)

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.weight * (scores.mean(2) - targets).square().mean()


class Detector(nn.Module):
    """Takes images of different sizes, returns losses in training and a list of results otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), Head()

    def forward(self, images: list[torch.Tensor], targets: torch.Tensor | None = None) -> Any:
        size = max(image.shape[-1] for image in images)
        batch = torch.stack([nn.functional.interpolate(image[None], (size, size))[0] for image in images])
        assert self.backbone.out_channels == 8
        scores = self.head(list(self.backbone(batch).values()))
        if self.training:
            if targets is None:
                raise ValueError("targets are needed in training")
            return {"loss": self.head.loss(scores, targets)}
        results = []
        for one in scores:
            keep = one.max(0).values > one.max(0).values.mean()
            if keep.sum() == 0:
                continue
            results.append({"scores": one[:, keep]})
        return results


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


IMAGES = [torch.rand(3, 10, 12, generator=torch.Generator().manual_seed(0)), torch.rand(3, 16, 16)]


def test_python_stays_in_charge_of_what_is_compressed_inside(detector: Detector) -> None:
    compact = fxc.compile(detector, PRUNE, (IMAGES,))
    with torch.no_grad():
        found = compact(IMAGES)
    assert [list(result) for result in found] == [["scores"], ["scores"]]
    assert compact.report is not None
    lines = {line.layer: line for line in compact.report.layers}
    assert lines["backbone.body.0"].notes[:2] == ("masked 16 -> 8", "pruned 16 -> 8")
    assert "not pruned: output of backbone, read by code that stays Python" in lines["backbone.body.3"].notes
    assert lines["head.tower.0"].notes[:2] == ("masked 12 -> 6", "pruned 12 -> 6")
    assert "opaque: could not be traced (control flow at " in lines["model"].notes[0]
    assert compact.report.before.parameters == sum(p.numel() for p in detector.parameters())
    assert compact.report.after.parameters == sum(p.numel() for p in compact.parameters())
    assert compact.report.after.parameters < 0.6 * compact.report.before.parameters


def test_a_model_with_regions_trains_with_its_own_methods(detector: Detector) -> None:
    compact = fxc.compile(detector, PRUNE, (IMAGES,)).train()
    losses = compact(IMAGES, torch.zeros(2, 5))
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in compact.parameters())
    assert len(compact.eval()([torch.rand(3, 20, 20)])) == 1


def test_a_model_that_does_something_else_in_training_stays_python_whatever_fails_in_it() -> None:
    class Selecting(Detector):
        """Everything but a function can be traced, but only for evaluation, without targets."""

        def forward(self, images: list[torch.Tensor], targets: torch.Tensor | None = None) -> Any:
            scores = self.head(list(self.backbone(torch.stack(images)).values()))
            if self.training and targets is not None:
                return {"loss": self.head.loss(scores, targets)}
            return by_sign(scores)[0]

    images = [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]
    compact = fxc.compile(Selecting().eval(), PRUNE, (images,))
    assert [region.layer for region in regions(compact)] == ["backbone", "head"]
    assert list(compact.train()(images, torch.zeros(2, 5))) == ["loss"]


def test_exact_passes_keep_the_outputs_of_a_model_with_regions(detector: Detector) -> None:
    compact = fxc.compile(detector, [P.Fuse()], (IMAGES,))
    inputs = ExampleInputs((IMAGES,))
    assert compare.difference(compare.run(detector, inputs), compare.run(compact, inputs)).relative < 1e-5
    masked = fxc.compile(detector, [P.MaskChannels(0.5, scope="layer")], (IMAGES,))
    pruned = fxc.compile(detector, [P.PruneChannels(0.5, scope="layer")], (IMAGES,))
    assert compare.difference(compare.run(masked, inputs), compare.run(pruned, inputs)).relative < 1e-5


def test_ignored_layers_of_a_region_are_named_as_in_the_model(detector: Detector) -> None:
    compact = fxc.compile(detector, [P.PruneChannels(0.5, scope="layer", ignore="backbone.*")], (IMAGES,))
    widths = [module.out_channels for module in compact.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [16, 8, 6, 5]


def test_regions_are_quantised(detector: Detector) -> None:
    compact = fxc.compile(detector, [P.Fuse(), P.Quantize(calibration=[(IMAGES,)])], (IMAGES,))
    kernels = [m for m in compact.modules() if type(m).__module__.startswith("fxcompress.emit.cpu")]
    assert kernels
    with torch.no_grad():
        assert len(compact(IMAGES)) == len(detector(IMAGES))


def test_masks_of_regions_hold_in_training(detector: Detector) -> None:
    batches = [(IMAGES, torch.ones(2, 5))] * 2

    def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
        return torch.stack([(result["scores"].mean() - 1).square() for result in output]).sum()

    class Loose(Detector):
        """Returns its results in training too."""

        def forward(self, images: list[torch.Tensor], targets: torch.Tensor | None = None) -> Any:
            training, self.training = self.training, False
            try:
                return super().forward(images, targets)
            finally:
                self.training = training

    train = P.Train([((images,), target) for images, target in batches], epochs=1, loss_function=loss)
    compact = fxc.compile(Loose().eval(), [P.MaskWeights(0.5), train], (IMAGES,))
    weights = [module.weight for module in compact.modules() if isinstance(module, nn.Conv2d)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == pytest.approx(0.5 * sum(weight.numel() for weight in weights), abs=4)


def test_regions_survive_copies_and_pickles(detector: Detector) -> None:
    compact = fxc.compile(detector, PRUNE, (IMAGES,))
    buffer = io.BytesIO()
    torch.save(compact, buffer)
    buffer.seek(0)
    inputs = ExampleInputs((IMAGES,))
    for twin in (copy.deepcopy(compact), torch.load(buffer, weights_only=False)):
        assert isinstance(twin, CompactModule)
        assert compare.difference(compare.run(compact, inputs), compare.run(twin, inputs)).relative == 0
        assert [region.layer for region in regions(twin)] == ["backbone", "head"]
        assert isinstance(twin.get_submodule("model.backbone"), Backbone)
    assert all(tensor.is_meta for region in regions(compact) for tensor in region.inputs.tensors())
    again = fxc.compile(compact, [P.PruneChannels(0.5, scope="layer")], (IMAGES,))
    assert again.report is not None
    assert again.report.after.parameters < again.report.before.parameters


def test_saving_names_the_class_that_cannot_be_saved(detector: Detector, around: Around, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Detector.*torch\.save"):
        fxc.compile(detector, PRUNE, (IMAGES,)).save(tmp_path / "model.fxc")
    with pytest.raises(ArtifactError, match=r"Gate.*config\(\)"):
        fxc.compile(around, PRUNE, torch.randn(5, 4)).save(tmp_path / "model.fxc")
    assert not list(tmp_path.iterdir())


def test_the_callers_model_keeps_its_modules(detector: Detector) -> None:
    before = [(path, id(module), len(module._forward_pre_hooks)) for path, module in detector.named_modules()]
    fxc.compile(detector, PRUNE, (IMAGES,))
    after = [(path, id(module), len(module._forward_pre_hooks)) for path, module in detector.named_modules()]
    assert before == after


def test_a_failed_attempt_leaves_nothing_behind_in_the_model() -> None:
    class Caching(nn.Module):
        cache: torch.Tensor | None = None

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
            if self.cache is None:
                self.cache = x.mean(0)
            y = self.layers(x)
            if y.sum() > 0 or self.training:
                y = -y
            return y + self.cache  # type: ignore[no-any-return]

    x = torch.randn(2, 4)
    model = Caching().eval()
    traced = fxc.trace(model, x)
    assert [region.layer for region in regions(traced)] == ["layers"]
    assert torch.equal(traced(x), model(x))


class Average(nn.Module):
    """Keeps a running average in a buffer."""

    average: torch.Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            self.average += x.mean(0)
        else:
            self.average = 0.5 * self.average + x.mean(0)
        return x - self.average


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_that_forward_updates_is_updated(in_place: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), Average(in_place)).eval()
    x = torch.randn(3, 4)
    traced = fxc.trace(model, x)
    fxc.graph.compare.require_same_outputs(model, traced, ExampleInputs((x,)))
    assert not model.get_buffer("2.average").any()
    for _ in range(3):
        assert torch.equal(traced(x), model(x))
    assert [str(node.target) for node in traced.graph.nodes if info(node).opaque] == ([] if in_place else ["2"])


def test_nothing_to_capture_is_an_error_with_file_and_line() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"Alone cannot be traced: control flow at .*test_capture_degrades\.py:\d+"):
        fxc.trace(Alone(), torch.randn(2, 4))


def test_masks_left_by_torch_prune_reach_the_regions(detector: Detector) -> None:
    from torch.nn.utils import prune

    prune.random_unstructured(detector.backbone.body[0], "weight", amount=0.5)
    traced = fxc.trace(detector, (IMAGES,))
    (backbone, _) = regions(traced)
    assert list(graph_info(backbone.graph_module).masks) == ["body.0.weight"]
    assert graph_info(traced).masks == {}


def test_a_detector_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96, box_score_thresh=0.0
    ).eval()
    images = [torch.rand(3, 64, 64)]
    compact = fxc.compile(model, PRUNE, example_inputs=(images,))
    assert compact.report is not None
    assert compact.report.after.parameters < 0.6 * compact.report.before.parameters
    with torch.no_grad():
        expected, found = model(images), compact(images)
    assert [result.keys() for result in expected] == [result.keys() for result in found]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    losses = compact.train()(images, targets)
    assert losses.keys() == model.train()(images, targets).keys()


class Table(nn.Module):
    """Keeps a table of positions until an input of another size comes."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.register_buffer("positions", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1]
        if self.positions.shape[0] != size:
            self.positions = torch.arange(size, dtype=torch.float32).view(-1, 1) / size
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.linear(x) * self.positions  # type: ignore[no-any-return]


def test_a_table_that_forward_computes_from_sizes_is_computed_once() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Table(), nn.Linear(8, 3)).eval(), torch.randn(2, 5, 4)
    graph = fxc.trace(model, x)
    assert not opaque.reasons(graph)
    assert any("0.positions: computed by the forward" in note for note in graph_info(graph).notes)
    assert cast(Table, model[0]).positions.shape == (1,)
    for size in (2, 3):
        inputs = torch.randn(size, 5, 4)
        assert torch.equal(graph(inputs), model(inputs))
    compact = fxc.compile(model, "prune-channels{ratio=0.5, scope=layer}", x)
    assert compact.get_parameter("0.linear.weight").shape == (4, 4)


class Counter(nn.Module):
    """Counts its calls: what it replaces depends on no input, but is no table either."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return x * self.calls


def test_a_buffer_that_changes_with_every_call_is_no_table() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Counter()).eval(), torch.randn(2, 4)
    graph = fxc.trace(model, x)
    assert "replaces the buffer 'calls'" in opaque.reasons(graph)["1"]
    for _ in range(2):
        assert torch.equal(graph(x), model(x))
