"""Which models get through: every architecture of torchvision and many of timm, captured, pruned, fused and trained.

    python benchmarks/coverage.py --json benchmarks/results/coverage.json            # all of them
    python benchmarks/coverage.py --models resnet18,vit_b_16 --json coverage.json    # some; other rows of the file stay
    python benchmarks/coverage.py --family timm --jobs 2 --resume --json coverage.json

Every model has a process and a time limit of its own, so that one that fails, hangs or takes all memory is one row of
the table. In that process: random weights, random statistics and affine values of the normalisations, then capture,
`MaskChannels(0.5, scope="layer")`, `RemoveChannels`, `Fuse`, and one forward and one backward in training mode.

captured: share of the parameters that belong to nodes which fxcompress understands. left: share of the parameters after
the removal. difference: largest difference between the outputs of the masked and of the pruned model, relative to the
largest output; for detectors, between the features, logits and boxes before they are sorted. seconds: everything from
capture to backward, without building the model. memory: peak of the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import resource
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import fx, nn
from torch.utils._pytree import tree_leaves

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.bench import write_json
from fxcompress.graph import compare, edit, ops
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline.manager import PipelineResult

PASSES = "mask-channels{ratio=0.5, scope=layer}, remove-channels, fuse"

#: Differences up to here are rounding in float32.
ROUNDING = 1e-4

#: Seconds to build a model and its inputs, which are not part of the limit.
_PATIENCE = 120.0

#: Architectures of timm, of families that differ in their building blocks.
TIMM = (
    "bat_resnext26ts", "beit_base_patch16_224", "botnet26t_256", "caformer_s18", "cait_xxs24_224", "coat_lite_tiny",
    "coatnet_0_224", "convformer_s18", "convit_tiny", "convnext_atto", "convnextv2_atto", "crossvit_9_240",
    "cspdarknet53", "cspresnet50", "darknet53", "davit_tiny", "deit3_small_patch16_224", "densenet121", "dla34",
    "dpn48b", "eca_nfnet_l0", "ecaresnet26t", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientnet_b0", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_dw", "eva02_tiny_patch14_224",
    "fasternet_t0", "fastvit_t8", "flexivit_small", "focalnet_tiny_srf", "gcresnext26ts", "gcvit_xxtiny", "gernet_s",
    "ghostnet_100", "ghostnetv2_100", "gmlp_ti16_224", "halonet26t", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0",
    "hiera_tiny_224", "hrnet_w18_small", "inception_next_tiny", "inception_v4", "lambda_resnet26t", "lcnet_050",
    "levit_128s", "mambaout_femto", "maxvit_tiny_tf_224", "mixer_s16_224", "mixnet_s", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny",
    "nextvit_small", "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny", "regnetz_b16",
    "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s", "resmlp_12_224", "resnest14d", "resnetv2_50",
    "rexnet_100", "sehalonet33ts", "selecsls42b", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s1",
    "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tf_efficientnetv2_b0",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small", "twins_svt_small", "visformer_tiny",
    "vit_small_patch16_dinov3", "vit_tiny_patch16_224", "volo_d1_224", "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip

#: Sides of square images, where 64 are too few.
SIDES = {
    "alexnet": 96, "inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56,
    "bat_resnext26ts": 256, "crossvit_9_240": 240, "efficientformer_l1": 224, "halonet26t": 256, "inception_v4": 96,
    "sehalonet33ts": 256,
}  # fmt: skip

#: Shapes of clips.
CLIPS = {
    "mc3_18": (2, 3, 8, 32, 32), "r2plus1d_18": (2, 3, 8, 32, 32), "r3d_18": (2, 3, 8, 32, 32),
    "s3d": (1, 3, 14, 224, 224), "mvit_v1_b": (1, 3, 16, 224, 224), "mvit_v2_s": (1, 3, 16, 224, 224),
    "swin3d_b": (2, 3, 4, 64, 64), "swin3d_s": (2, 3, 4, 64, 64), "swin3d_t": (2, 3, 4, 64, 64),
}  # fmt: skip

#: Arguments of torchvision's builders, by the beginning of the name.
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
    **{
        name: {"min_size": 96, "max_size": 128}
        for name in ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet")
    },
}

#: Families whose backbones would be downloaded.
_WITH_BACKBONE = ("deeplabv3", "fasterrcnn", "fcn_", "fcos", "keypointrcnn", "lraspp", "maskrcnn", "retinanet", "ssd")
_DETECTION = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")


@dataclass(frozen=True)
class Row:
    """What became of one model.

    captured, left: shares of the parameters. difference: relative to the largest output. processor_seconds: of all
    threads together; on a busy machine they say more than the clock. megabytes: peak of the process.
    status: "ok", "differs" (more than rounding), "fails", "too slow". stage: the last one that was begun.
    error: first line of what went wrong. reason: why most of the parameters that could not go stayed.
    """

    family: str
    name: str
    parameters: int | None = None
    captured: float | None = None
    left: float | None = None
    difference: float | None = None
    seconds: float | None = None
    processor_seconds: float | None = None
    megabytes: int | None = None
    status: str = "fails"
    stage: str = "build"
    error: str | None = None
    reason: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=lambda text: text.split(","), help="names with commas between them")
    parser.add_argument("--family", choices=("torchvision", "timm"))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each model")
    parser.add_argument("--resume", action="store_true", help="leave out models that the JSON file has")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = {(row.family, row.name): row for row in read_rows(options.json)}
    wanted = selected(options.family, options.models, parser.error)
    todo = [key for key in wanted if not (options.resume and key in known)]
    try:
        for row in measure_all(todo, options.jobs, options.limit, options.threads):
            known[row.family, row.name] = row
            if options.json is not None:
                write_json(options.json, {"passes": PASSES, "rows": [dataclasses.asdict(known[key]) for key in known]})
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from here")
    show([known[key] for key in wanted if key in known])


def read_rows(path: Path | None) -> list[Row]:
    """Return the rows of an earlier run."""
    if path is None or not path.exists():
        return []
    return [Row(**row) for row in json.loads(path.read_text())["results"]["rows"]]


def selected(family: str | None, names: Sequence[str] | None, refuse: Callable[[str], object]) -> list[tuple[str, str]]:
    """Return (family, name) of the models asked for."""
    found = [(one, name) for one in ("torchvision", "timm") if family in (None, one) for name in architectures(one)]
    if names is None:
        return found
    unknown = [name for name in names if name not in {name for _, name in found}]
    if unknown:
        refuse(f"no architecture is called {', '.join(unknown)}")
    return [(one, name) for one, name in found if name in names]


def architectures(family: str) -> Sequence[str]:
    """Return the names of a family's models."""
    if family == "timm":
        return TIMM
    listed = importlib.import_module("torchvision.models").list_models()
    return [name for name in listed if not name.startswith("quantized_")]


def measure_all(wanted: Sequence[tuple[str, str]], jobs: int, limit: float, threads: int) -> Iterator[Row]:
    """Yield a row for each model, as they get ready."""
    with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("models", total=len(wanted))
        try:
            for row in pool.map(lambda key: measure(key[0], key[1], limit, threads), wanted):
                progress.update(task, advance=1, description=f"{row.name}: {row.status}")
                yield row
        finally:
            pool.shutdown(cancel_futures=True)


def measure(family: str, name: str, limit: float, threads: int) -> Row:
    """Return what becomes of one model in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(there, family, name, threads), daemon=True)
    process.start()
    there.close()
    try:
        return _listen(here, Row(family, name), limit)
    except EOFError:
        process.join()
        return Row(family, name, error=f"the process died with exit code {process.exitcode}")
    finally:
        here.close()
        process.kill()
        process.join()


def _listen(connection: Connection, row: Row, limit: float) -> Row:
    """Take what the process says, until it has finished or its time is over."""
    end = time.monotonic() + _PATIENCE
    while connection.poll(max(0.0, end - time.monotonic())):
        before, row = row, connection.recv()
        if row.status != "begun":
            return row
        if before.stage == "build":
            end = time.monotonic() + limit
    seconds = _PATIENCE if row.stage == "build" else limit
    return dataclasses.replace(row, status="too slow", error=f"{row.stage} had not ended after {seconds:.0f} s")


# In the process of a model


def _serve(connection: Connection, family: str, name: str, threads: int) -> None:
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(threads)
    journey = Journey(Row(family, name, status="begun"), connection)
    try:
        journey.run()
    except Exception as error:
        lines = str(error).strip().split("\n")
        journey.note(status="fails", error=f"{type(error).__name__}: {lines[0]}"[:400])


class Journey:
    """One model on its way; says after every stage how far it has come."""

    def __init__(self, row: Row, connection: Connection) -> None:
        self.row = row
        self.connection = connection
        self.start: float | None = None
        self.processor_start = 0.0

    def note(self, **values: Any) -> None:
        """Write something down and send the row."""
        if self.start is not None:
            values["seconds"] = round(time.perf_counter() - self.start, 2)
            values["processor_seconds"] = round(time.process_time() - self.processor_start, 2)
        values["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.row = dataclasses.replace(self.row, **values)
        self.connection.send(self.row)

    def run(self) -> None:
        """From the model's name to the gradients of the pruned model."""
        model, inputs, training_inputs = build(self.row.family, self.row.name)
        self.start, self.processor_start = time.perf_counter(), time.process_time()
        self.note(stage="capture", parameters=sum(parameter.numel() for parameter in model.parameters()))
        graph = fxc.trace(model, inputs)
        self.note(stage="mask")
        masked = fxc.PassManager([P.MaskChannels(0.5, scope="layer")], verify=False).run(graph, inputs)
        self.note(stage="remove", captured=round(captured_share(masked.graph_module), 4))
        removed = fxc.PassManager([P.RemoveChannels()], verify=False).run(masked.graph_module, inputs)
        left = removed.rows[-1].cost.parameters / masked.start.parameters
        self.note(stage="compare", left=round(left, 4), reason=main_reason(masked, removed))
        lists = self.row.name.startswith(_DETECTION)
        expected = outputs(masked.graph_module, inputs, lists)
        check_outputs(expected)
        gap = compare.difference(expected, outputs(removed.graph_module, inputs, lists))
        self.note(stage="fuse", difference=gap.relative)
        fused = fxc.PassManager([P.Fuse()]).run(removed.graph_module, inputs)
        self.note(stage="train")
        train(fused.graph_module, training_inputs)
        exact = gap.relative <= ROUNDING
        self.note(stage="end", status="ok" if exact else "differs", error=None if exact else gap.where)


def build(family: str, name: str) -> tuple[nn.Module, ExampleInputs, ExampleInputs]:
    """Return a model in evaluation mode, its inputs, and those for training where they differ."""
    torch.manual_seed(0)
    model = _timm(name) if family == "timm" else _torchvision(name)
    randomise(model)
    inputs = _inputs(name)
    training = inputs
    if name.startswith(_DETECTION):
        training = ExampleInputs((inputs.args[0], [_target(name) for _ in inputs.args[0]]))
    return model.eval(), inputs, training


def _torchvision(name: str) -> nn.Module:
    options: dict[str, Any] = {}
    for beginning, more in OPTIONS.items():
        if name.startswith(beginning):
            options |= more
    if name.startswith(_WITH_BACKBONE):
        options["weights_backbone"] = None
    model: nn.Module = importlib.import_module("torchvision.models").get_model(name, weights=None, **options)
    return model


def _timm(name: str) -> nn.Module:
    create = importlib.import_module("timm").create_model
    side = SIDES.get(name, 64)
    try:
        model: nn.Module = create(name, pretrained=False, img_size=side)
    except TypeError:  # many take images of any size, and have no such argument
        model = create(name, pretrained=False)
    if getattr(model, "num_classes", 1) == 0:  # published without a classifier
        model.reset_classifier(1000)  # type: ignore[operator]
    return model


def _inputs(name: str) -> ExampleInputs:
    if name.startswith(_DETECTION):
        return ExampleInputs(([torch.rand(3, 96, 128), torch.rand(3, 128, 96)],))
    if name.startswith("raft"):
        return ExampleInputs((torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)))
    side = SIDES.get(name, 64)
    return ExampleInputs((torch.randn(CLIPS.get(name, (2, 3, side, side))),))


def _target(name: str) -> dict[str, torch.Tensor]:
    """Two objects in an image of at least 96 x 96, as torchvision's detection models take them in training."""
    target = {"boxes": torch.tensor([[8.0, 8.0, 48.0, 40.0], [30.0, 20.0, 90.0, 90.0]]), "labels": torch.tensor([1, 1])}
    if name.startswith("maskrcnn"):
        target["masks"] = torch.ones(2, 96, 96, dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        target["keypoints"] = torch.tensor([20.0, 30.0, 1.0]).expand(2, 17, 3).contiguous()
    return target


def randomise(model: nn.Module) -> None:
    """Draw statistics and affine values of all normalisations, and the scales of residual branches, at random.

    As they are initialised, dead channels carry nothing but zeros, and branches scaled by 1e-6 nothing at all.
    """
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if name.endswith("var"):
                    tensor.data.uniform_(0.5, 2.0)
                elif tensor.is_floating_point() and name in ("weight", "bias", "running_mean"):
                    tensor.data.normal_(1.0 if name == "weight" else 0.0, 0.3)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and not parameter.any():  # classifiers that start at zero
                parameter.data.normal_(0.0, 0.05)
            if name in ("gamma", "layer_scale", "gamma_1", "gamma_2"):
                parameter.data.uniform_(0.5, 1.5)


def captured_share(graph_module: fx.GraphModule) -> float:
    """Return the share of a graph's parameters that its nodes read, other than those fxcompress does not know."""
    captured = {id(tensor): tensor.numel() for tensor in _captured(graph_module)}
    total = sum(parameter.numel() for parameter in graph_module.parameters())
    return sum(captured.values()) / max(total, 1)


def _captured(graph_module: fx.GraphModule) -> Iterator[nn.Parameter]:
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and any(ops.kind(reader) != "opaque" for reader in node.users):
            found = edit.attribute(graph_module, str(node.target))
            yield from (found,) if isinstance(found, nn.Parameter) else ()
        elif node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if ops.kind(node) != "opaque":
                yield from module.parameters()
            for inner in module.modules():  # graphs inside of what could not be traced as a whole
                if isinstance(inner, fx.GraphModule):
                    yield from _captured(inner)


def main_reason(masked: PipelineResult, removed: PipelineResult) -> str | None:
    """Return why most of the parameters stayed that were not to stay, with names left out; None if there are none."""
    before, after = masked.start.layers, removed.rows[-1].cost.layers
    reasons: dict[str, set[str]] = defaultdict(set)
    for note in (note for row in (*masked.rows, *removed.rows) for note in row.notes):
        words = note.text.partition(": ")[2] if note.text.startswith(("not masked", "not pruned")) else ""
        reasons[note.layer].add(_without_names(words))
    weights: Counter[str] = Counter()
    for layer, cost in after.items():
        named = layer if layer in reasons else layer.rpartition(".")[0]  # a tensor that its layer's code reads itself
        silent = named not in reasons and layer in before and before[layer].parameters == cost.parameters
        for words in {"no reason given"} if silent else reasons[named]:
            weights[words] += cost.parameters if words else 0
    reason, parameters = max(weights.items(), key=lambda item: item[1], default=("", 0))
    return f"{reason} ({parameters / removed.rows[-1].cost.parameters:.0%} of what is left)" if parameters else None


def _without_names(text: str) -> str:
    """Leave out what is particular to one layer, so that equal reasons are equal texts."""
    return re.sub(r"\d+", "n", re.sub(r"`[^`]*`|\([\w.]*\)|\b[\w-]+(\.[\w-]+)+|\b[a-z]\w*_\d+\b", "...", text))


def outputs(graph_module: fx.GraphModule, inputs: ExampleInputs, only_regions: bool) -> list[Any]:
    """Return what the graphs inside a model that stays Python make, and the model's own output unless they suffice.

    Detectors return lists that are sorted by score: where two are equal, rounding decides which comes first.
    """
    made: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: made.append(output))
        for name, module in graph_module.named_modules()
        if name and isinstance(module, fx.GraphModule)
    ]
    result = compare.run(graph_module, inputs)
    for hook in hooks:
        hook.remove()
    return made if made and only_regions else [*made, result]


def check_outputs(output: Any) -> None:
    """Refuse outputs that would equal any others."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.numel()]
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError("the masked model's outputs are not finite, so there is nothing to compare")
    if tensors and not any(tensor.any() for tensor in tensors):
        raise ValueError("the masked model's outputs are zero, so there is nothing to compare")


def train(graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    """One forward and one backward in training mode."""
    graph_module.train()
    leaves = [leaf for leaf in tree_leaves(inputs.call(graph_module)) if isinstance(leaf, torch.Tensor)]
    losses = [leaf.float().mean() for leaf in leaves if leaf.requires_grad]
    if not losses:
        raise ValueError("no output has a gradient in training mode")
    torch.stack(losses).sum().backward()
    gradients = [parameter.grad for parameter in graph_module.parameters() if parameter.grad is not None]
    if not gradients:
        raise ValueError("no parameter got a gradient")


# The table


def show(rows: Sequence[Row]) -> None:
    """Print the rows, and how many keep what is promised."""
    table = Table("model", "parameters", "captured", "left", "difference", "s", "MB", "status", "error or reason")
    for row in rows:
        numbers = [
            "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M",
            "" if row.captured is None else f"{row.captured:.1%}",
            "" if row.left is None else f"{row.left:.2f}",
            "" if row.difference is None else f"{row.difference:.0e}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.megabytes is None else str(row.megabytes),
        ]
        remark = f"{row.stage}: {row.error}" if row.error else (row.reason if (row.left or 0) > 0.40 else "")
        table.add_row(row.name, *numbers, row.status, remark)
    Console(width=180).print(table)
    counts = Counter(row.status for row in rows)
    print(", ".join(f"{count} {status}" for status, count in counts.most_common()) + f", of {len(rows)} models")
    print(
        f"{sum(1 for row in rows if row.left is not None and row.left > 0.40)} keep more than 0.40 of their parameters"
    )


if __name__ == "__main__":
    main()
