"""The command line: `fxcompress demo`, `recipes`, `compress`, `inspect`, `bench`, `passes`."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import fxcompress
from fxcompress import processes
from fxcompress.errors import FxCompressError, InputError, OptionError
from fxcompress.pipeline.base import Pass

if TYPE_CHECKING:
    from fxcompress.bench import Workload
    from fxcompress.sources import Source

app = typer.Typer(
    name="fxcompress",
    help="Make trained PyTorch models small and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODEL = "A torchvision model, file.py:function, or an artefact (*.fxc)."

Model = Annotated[str, typer.Argument(help=_MODEL, show_default=False)]
Shapes = Annotated[
    list[str] | None, typer.Option("--input-shape", help="Shape of an input, e.g. 1,3,224,224; once for each input.")
]
Weights = Annotated[
    str | None, typer.Option(help="For a torchvision model: 'default' (downloaded) or a file with a state_dict.")
]
Classes = Annotated[int | None, typer.Option("--classes", help="For a torchvision model: outputs of the classifier.")]
Seed = Annotated[int, typer.Option(help="For random weights and inputs.")]


def main() -> None:
    """Run the command line. Errors of fxcompress become one message and exit code 2."""
    try:
        app()
    except FxCompressError as error:
        print(f"fxcompress: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(f"fxcompress {fxcompress.__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the artefact and the figures.")] = Path(
        "fxcompress-demo"
    ),
    epochs: Annotated[int, typer.Option(help="Epochs of training from scratch.")] = 5,
    finetune: Annotated[int, typer.Option(help="Epochs of training after pruning.")] = 6,
    ratio: Annotated[float, typer.Option(help="Share of all channels that is pruned.")] = 0.6,
    seed: Annotated[int, typer.Option(help="For weights, data order and the split.")] = 0,
) -> None:
    """Train a small CNN on 5,000 MNIST digits, prune it, fine-tune, quantise, and show what that gave."""
    from fxcompress.demo import run

    run(out, epochs=epochs, finetune=finetune, ratio=ratio, seed=seed)


@app.command()
def recipes(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes to run, or 'all'; none: list them.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipes, as text and in Python; run nothing.")
    ] = False,
    network: Annotated[str, typer.Option(help="The network to compress: baby-cnn or resnet-20.")] = "baby-cnn",
    data: Annotated[
        str,
        typer.Option(help="mnist, fashion-mnist (Debian's package dataset-fashion-mnist), or a folder of such files."),
    ] = "mnist",
    seed: Annotated[int, typer.Option(help="For weights, data order and what passes draw.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every training, instead of its own; a trial.")] = None,
    samples: Annotated[int | None, typer.Option(min=64, help="Images to train on, at most; a trial.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for what recipes make: artefacts, figures, a plot.")] = Path(
        "fxcompress-recipes"
    ),
) -> None:
    """List workflows of compression, show them, or try them on a small network and real images."""
    from fxcompress.recipes import launch
    from fxcompress.recipes.catalogue import RECIPES, as_python, find_recipe, pipeline_lines

    chosen = list(RECIPES.values()) if names == ["all"] else [find_recipe(name) for name in names or ()]
    if show or not chosen:
        for recipe in chosen or RECIPES.values():
            print(f"{recipe.name}{launch.remark(recipe)}")
            print(f"    {recipe.sentence}")
            for line in pipeline_lines(recipe.passes):
                print(f"    {line}")
            if show:
                print(f"\n{as_python(recipe)}\n")
        return
    launch.run(chosen, launch.Trial(network, data, seed, epochs, samples, out))


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="The artefact to write.")],
    passes: Annotated[
        str | None,
        typer.Option(help="Pipeline text, or the name of a preset; int8 for CPUs, for GPUs what --dtype needs."),
    ] = None,
    report: Annotated[
        list[str] | None,
        typer.Option(help="'text' prints the whole report; a path ending in .txt, .json or .html writes it."),
    ] = None,
    input_shape: Shapes = None,
    calibration: Annotated[
        str | None, typer.Option(help="file.py:function that returns batches of inputs; or 'random', for a trial.")
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(help="file.py:function that returns batches of (input, target).")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="file.py:function that returns batches of (input, target) to measure training by."),
    ] = None,
    weights: Weights = None,
    classes: Classes = None,
    target: Annotated[str, typer.Option(help="What the result shall run on: cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="For --target cuda: fp16, bf16, int8 or fp8; layers that it slows stay fp16.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare outputs across passes that promise to be exact.")] = True,
    seed: Seed = 0,
) -> None:
    """Compile a model and save it."""
    from fxcompress.pipeline.presets import passes_for
    from fxcompress.sources import find_calibration, find_model, named_value

    for destination in report or ():
        _check_destination(destination)
    source = find_model(model, input_shape or (), weights, classes, seed)
    if calibration == "random":
        _warn("calibration with random noise: scales fit no real data, and accuracy means nothing")
    for remark in source.remarks:
        _warn(remark)
    chosen = passes_for(passes, target, dtype)
    _require_data(chosen, calibration, train_data)
    compact = fxcompress.compile(
        source.model,
        chosen,
        source.example_inputs,
        target=target,
        dtype=dtype,
        verify=verify,
        calibration=None if calibration is None else find_calibration(calibration, source.example_inputs),
        train_data=None if train_data is None else named_value(train_data),
        validation=None if validation is None else named_value(validation),
    )
    compact.save(out)
    if not processes.is_main():
        return
    assert compact.report is not None
    print(compact.report.table(layers="text" in (report or ())))
    for destination in report or ():
        _write_report(compact.report, destination)
    print(f"wrote {out} ({out.stat().st_size:,} bytes)")


def _require_data(passes: list[Pass], calibration: str | None, train_data: str | None) -> None:
    """Say which option of this command brings the data that a pipeline needs."""
    from fxcompress.pipeline.manager import PassManager

    names = {item.name for item in PassManager(passes).passes}
    if "calibrate" in names and calibration is None and not names & {"train", "distill"}:
        raise InputError(
            "these passes need calibration data: give --calibration file.py:function, whose function returns batches "
            "of real inputs, or --calibration random for a trial whose accuracy means nothing"
        )
    untrained = names & {"train", "distill"} - ({"distill"} if calibration else set())
    if untrained and train_data is None:
        raise InputError("these passes need training data: give --train-data file.py:function, whose function returns "
                         "batches of (input, target)")  # fmt: skip


def _check_destination(destination: str) -> None:
    if destination != "text" and Path(destination).suffix not in (".txt", ".json", ".html"):
        raise OptionError(f"--report takes 'text' or a path ending in .txt, .json or .html, not {destination!r}")


def _write_report(report: fxcompress.Report, destination: str) -> None:
    if destination == "text":
        return
    path = Path(destination)
    try:
        if path.suffix == ".html":
            report.to_html(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        else:
            path.write_text(report.table())
    except OSError as error:
        raise OptionError(f"cannot write the report {destination!r}: {error}") from error
    print(f"wrote {path}")


@app.command()
def inspect(
    model: Model,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each pattern was fused or not.")] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure the loss with each family of channels masked; needs data.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="For --sensitivity: file.py:function that returns batches of inputs; or 'random', a trial."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="For --sensitivity: file.py:function that returns batches of (input, target).")
    ] = None,
    loss: Annotated[str, typer.Option(help="For --validation: cross_entropy, mse, ...")] = "cross_entropy",
    plot: Annotated[Path | None, typer.Option(help="Draw the sensitivity into this .png, .svg or .pdf.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the sensitivity here.")] = None,
    input_shape: Shapes = None,
    weights: Weights = None,
    classes: Classes = None,
) -> None:
    """Show the graph of a model, its layers and costs, why patterns are fused or not, and what pruning would hurt."""
    from fxcompress.analysis.cost import cost
    from fxcompress.graph.printer import print_graph
    from fxcompress.report import amount
    from fxcompress.sources import find_model

    if sensitivity and calibration is None and validation is None:
        raise InputError("--sensitivity needs data: --calibration file.py:function with batches of inputs, or "
                         "--validation file.py:function with batches of (input, target)")  # fmt: skip
    source = find_model(model, input_shape or (), weights, classes)
    if sensitivity:
        _sensitivity(source, calibration, None if validation is None else (validation, loss), plot, json_path)
        return
    graph_module = fxcompress.trace(source.model, source.example_inputs)
    if not isinstance(source.model, fxcompress.CompactModule):
        graph_module = fxcompress.PassManager("canonicalize").run(graph_module, source.example_inputs).graph_module
    print(print_graph(graph_module))
    found = cost(graph_module)
    table = Table("layer", "kind", "shape", "parameters", "MACs", "bytes", title=source.name)
    for name, layer in found.layers.items():
        shape = "x".join(map(str, layer.shape))
        table.add_row(name, layer.kind, shape, *map(amount, (layer.parameters, layer.macs, layer.bytes)))
    table.add_section()
    table.add_row("total", "", "", amount(found.parameters), amount(found.macs), amount(found.bytes))
    _console().print(table)
    if explain:
        from fxcompress.pipeline.presets import read_passes
        from fxcompress.rewrite.explain import explain as explain_rules
        from fxcompress.rewrite.explain import explanation, rules_of

        print(explanation(explain_rules(graph_module, rules_of(read_passes("fuse")))))


def _sensitivity(
    source: Source, calibration: str | None, labelled: tuple[str, str] | None, plot: Path | None, json_path: Path | None
) -> None:
    """Measure how each family of channels matters; print a table, and write the plot and the figures."""
    from fxcompress.analysis.sensitivity_plot import plot as draw
    from fxcompress.bench import write_json
    from fxcompress.sources import find_calibration, named_value

    for remark in source.remarks:
        _warn(remark)
    if labelled is not None:
        data, loss = named_value(labelled[0]), labelled[1]
    else:
        data, loss = find_calibration(calibration or "random", source.example_inputs), None
    found = fxcompress.sensitivity(source.model, source.example_inputs, data, loss)
    table = Table("layer", "channels", *(f"{step:.0%}" for step in found.steps))
    table.title = f"{source.name}: {found.measure} ({found.baseline:.4g} with nothing masked)"
    for family in found.families:
        table.add_row(family.layer, str(family.channels), *(f"{value:.3g}" for value in family.losses))
    _console().print(table)
    if plot is not None:
        draw(found, plot, f"{source.name}: what masking a family of channels does")
        print(f"wrote {plot}")
    if json_path is not None:
        write_json(json_path, found.to_dict())
        print(f"wrote {json_path}")


@app.command()
def bench(
    model: Model,
    passes: Annotated[str, typer.Option(help="What fxcompress compiles the model with.")] = "int8",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,16",
    input_shape: Shapes = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine has its turn.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long a turn lasts at each batch size.")] = 1.0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each engine; 0: as torch chooses.")] = 0,
    torch_compile: Annotated[bool, typer.Option("--torch-compile", help="Time torch.compile as well.")] = False,
    peers: Annotated[
        str, typer.Option(help="Other int8 engines, with commas: onnxruntime, openvino, torchao, torch-ao; or 'all'.")
    ] = "",
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer's time beside what its arithmetic alone would take.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the timings into this .png, .svg or .pdf.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time a model before and after compilation and in other engines, or an artefact; each in a process of its own."""
    from fxcompress import bench_views
    from fxcompress.bench import Builder, Workload, compare, compiled, eager, result, with_torch_compile, write_json
    from fxcompress.peers import against_best, find_peers
    from fxcompress.pipeline.progress import progress_bar
    from fxcompress.sources import find_model

    others = find_peers(name.strip() for name in peers.split(",") if name.strip())
    source = find_model(model, input_shape or ())  # so that a wrong name is said here, not by another process
    saved = isinstance(source.model, fxcompress.CompactModule)
    if saved and others:
        raise OptionError(f"--peers needs the float model that other engines can compile, and {model} is compiled")
    ours = "artefact" if saved else f"fxcompress ({passes})"
    engines: dict[str, Builder] = {ours if saved else "float": eager}
    if not saved:
        if torch_compile:
            engines["torch.compile"] = with_torch_compile
        engines |= {peer.title: peer.build for peer in others}
        engines[ours] = functools.partial(compiled, passes=passes)
    workload = Workload(model, tuple(input_shape or ()), _batches(batch), threads)
    with progress_bar() as progress:
        timings = compare(workload, engines, rounds, seconds, progress)
    _console().print(bench_views.timing_table(timings, f"{model}: median of {rounds} rounds"))
    made = result(workload, timings)
    made["against_best_peer"] = against_best(timings, ours, (peer.title for peer in others))
    print("".join(f"{line}\n" for line in bench_views.against_best_lines(made["against_best_peer"], ours)), end="")
    if layers:
        made["layers"] = _bench_layers(workload, None if saved else passes)
    if plot is not None:
        bench_views.plot(timings, plot, model)
        print(f"wrote {plot}")
    if json_path is not None:
        write_json(json_path, [made])
        print(f"wrote {json_path}")
    if all(timing.median is None for timing in timings):
        raise FxCompressError("no engine could run the model")


def _bench_layers(workload: Workload, passes: str | None) -> list[dict[str, Any]]:
    """Measure the layers at each batch size, print a table of each, and return the figures."""
    from fxcompress.bench import batches_of, compact_of
    from fxcompress.bench_layers import time_layers
    from fxcompress.bench_views import layer_table

    found: list[dict[str, Any]] = []
    peak: float | None = None
    for source in batches_of(workload):
        times = time_layers(compact_of(source, passes), source.example_inputs, workload.threads, peak=peak)
        peak = times.peak
        _console().print(layer_table(times, source.name))
        found.append(times.to_dict())
    return found


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise OptionError(f"--batch takes sizes with commas, such as 1,16, not {text!r}")
    return sizes


@app.command()
def passes() -> None:
    """List the passes, with their options."""
    from fxcompress.pipeline import registry
    from fxcompress.pipeline.presets import PRESETS

    for name in registry.names():
        found = registry.find(name)
        print(f"{name}  [{found.contract}; {_stages(found)}]")
        print(f"    {_first_line(found)}")
        for option, text in _options(found):
            print(f"    {option}: {text}")
    print("presets")
    for name, text in PRESETS.items():
        print(f"    {name}: {text}")


def _stages(found: type[Pass]) -> str:
    taken = " or ".join(sorted(str(stage) for stage in found.requires))
    return f"{taken} -> {found.produces or 'the same'}"


def _first_line(found: type[Pass]) -> str:
    return (found.__doc__ or "").strip().split("\n")[0]


def _options(found: type[Pass]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for option in dataclasses.fields(found):
        kind = str(option.type).replace("typing.", "")
        if option.metadata.get("data"):
            rows.append((option.name, "data, given in Python"))
        elif option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING:
            rows.append((option.name, f"{kind}, needed"))
        else:
            default: Any = option.default
            if option.default_factory is not dataclasses.MISSING:
                default = option.default_factory()
            passes = isinstance(default, tuple) and default and all(isinstance(item, Pass) for item in default)
            rows.append((option.name, f"{kind} = {', '.join(map(str, default)) if passes else repr(default)}"))
    return rows


def _console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough for a file."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _warn(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]warning:[/] {text}", highlight=False)
