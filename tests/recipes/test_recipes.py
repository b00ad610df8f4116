"""Recipes: each one does what its sentence says, on digits; what is printed is what runs."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

import fxcompress as fxc
from fxcompress import cli
from fxcompress import passes as P
from fxcompress.demo import Digits
from fxcompress.errors import InputError, OptionError, ProcessError
from fxcompress.pipeline.text import parse, print_pipeline
from fxcompress.recipes import figures, launch, runs
from fxcompress.recipes.catalogue import RECIPES, Recipe, as_python, find_recipe, pipeline_lines, prepared
from fxcompress.recipes.data import ImageData, load_data
from fxcompress.recipes.figures import plot, summarise, table
from fxcompress.recipes.networks import NETWORKS, SmallResNet, find_network
from fxcompress.recipes.runs import Row, Study, fresh, trained

pytestmark = pytest.mark.xdist_group("recipes")  # one trained network for all

SMALL = dataclasses.replace(NETWORKS["baby-cnn"], width=12, student=7)


@pytest.fixture(scope="module")
def data() -> ImageData:
    """320 digits to train on, 100 to test with."""
    given = load_data("mnist", 0, 320)
    return dataclasses.replace(given, test=Digits(given.test.images[:100], given.test.labels[:100]))


@pytest.fixture(scope="module")
def study(data: ImageData) -> Iterator[Study]:
    """A network that has seen the digits twice; every training of a recipe sees them once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield dataclasses.replace(trained(SMALL, data, 0, epochs=2), epochs=1, turn=0.0)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(study: Study) -> Row:
    return study.float_row()


def macs(share: float, within: float = 0.03) -> Callable[[Row, Row], bool]:
    return lambda row, start: abs(row.macs / start.macs - share) <= within * share and row.parameters < start.parameters


def zeros(share: float) -> Callable[[Row, Row], bool]:
    return lambda row, start: abs(row.sparsity - share) < 0.003 and row.macs == start.macs


def int8(row: Row, start: Row) -> bool:
    return row.file_bytes < 0.45 * start.file_bytes and row.macs == start.macs


def a_third(row: Row, start: Row) -> bool:
    return row.parameters < 0.36 * start.parameters and row.sparsity < 0.01


#: What each recipe promises of its figures, given those of the network as it was trained.
PROMISES: dict[str, Callable[[Row, Row], bool]] = {
    "unstructured-l1": zeros(0.4),
    "unstructured-60": zeros(0.6),
    "structured-l2": macs(0.26, within=0.06),  # half of the inputs and outputs, but the image has one channel
    "random-weights": zeros(0.4),
    "random-channels": macs(0.26, within=0.06),
    "global": zeros(0.9),
    "layer-wise": zeros(0.9),
    "one-shot": zeros(0.8),
    "iterative": zeros(0.8),
    "half-macs": macs(0.5),
    "quarter-macs": macs(0.25),
    "ptq": int8,
    "qat": int8,
    "qat-w4a8": lambda row, start: row.file_bytes < 20_000 + row.parameters * 0.6,
    "student-alone": a_third,
    "distillation": a_third,
    "prune-qat-distill": lambda row, start: macs(0.25)(row, start) and row.file_bytes < 0.4 * start.file_bytes,
    "several-processes": lambda row, start: macs(0.5)(row, start) and row.file_bytes < 0.4 * start.file_bytes,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_does_what_its_sentence_says(study: Study, reference: Row, name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    before = {key: value.clone() for key, value in study.model.state_dict().items()}
    row, compact = study.run(recipe, tmp_path)
    assert PROMISES[name](row, reference), (row, reference)
    assert parse(row.passes) == prepared(recipe.passes, epochs=1)
    assert row.milliseconds > 0 < row.float_milliseconds
    assert 0 <= row.accuracy <= 1
    assert row.file_bytes == (tmp_path / f"{name}.fxc").stat().st_size
    images = study.data.test.images
    with torch.inference_mode():
        assert torch.equal(fxc.load(tmp_path / f"{name}.fxc")(images), compact(images))
    assert all(torch.equal(value, before[key]) for key, value in study.model.state_dict().items())


def test_layer_wise_masks_the_same_share_of_every_layer(study: Study) -> None:
    def shares(name: str) -> list[float]:
        graph = study.compress(dataclasses.replace(RECIPES[name], passes="canonicalize, " + RECIPES[name].passes))
        return [float((one == 0).float().mean()) for one in graph.parameters() if one.ndim >= 2]

    assert all(abs(share - 0.9) < 0.02 for share in shares("layer-wise"))
    assert max(shares("global")) - min(shares("global")) > 0.1


def test_the_teacher_of_a_student_is_the_trained_network(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    find = P.Distill._teacher

    def teacher(self: P.Distill, context: fxc.pipeline.base.PassContext) -> torch.nn.Module:
        asked.append(find(self, context))
        return find(self, context)

    monkeypatch.setattr(P.Distill, "_teacher", teacher)
    study.compress(RECIPES["distillation"])
    assert asked
    assert all(one is study.model for one in asked)


def test_the_seed_reaches_whatever_draws(study: Study) -> None:
    [mask, train, _] = prepared(RECIPES["random-weights"].passes, seed=5)
    assert isinstance(mask, P.MaskWeights)
    assert isinstance(train, P.Train)
    assert (mask.seed, train.seed) == (5, 5)
    iterate, *_ = prepared(RECIPES["iterative"].passes, seed=7, epochs=9)
    assert isinstance(iterate, P.Iterate)
    assert (iterate.train[0].seed, iterate.train[0].epochs, iterate.prune[0].seed) == (7, 9, 7)
    recipe = Recipe("drawn", "", "mask-weights{amount=0.5, method=random}")
    one, same, other = (dataclasses.replace(study, seed=seed).compress(recipe) for seed in (1, 1, 2))
    assert torch.equal(one.get_parameter("conv2.weight"), same.get_parameter("conv2.weight"))
    assert not torch.equal(one.get_parameter("conv2.weight"), other.get_parameter("conv2.weight"))


def test_one_shot_and_iterative_have_the_same_training() -> None:
    def epochs(name: str) -> int:
        return sum(item.epochs or 0 for item in fxc.PassManager(RECIPES[name].passes).passes
                   if isinstance(item, P.Train))  # fmt: skip

    assert epochs("one-shot") == epochs("iterative")
    assert epochs("global") == epochs("layer-wise")


# Networks and data


def test_the_residual_network_has_the_size_of_resnet_20() -> None:
    network = NETWORKS["resnet-20"]
    model = fresh(network, network.width, 0)
    assert isinstance(model, SmallResNet)
    convolutions = [one for one in model.modules() if isinstance(one, torch.nn.Conv2d) and one.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20
    assert sum(one.numel() for one in model.parameters()) == pytest.approx(270_000, rel=0.02)  # as in the paper
    small = sum(one.numel() for one in fresh(network, network.student, 0).parameters())
    assert small / sum(one.numel() for one in model.parameters()) == pytest.approx(1 / 3, rel=0.06)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_channels_of_the_residual_network_go_through_its_sums(data: ImageData) -> None:
    network = dataclasses.replace(NETWORKS["resnet-20"], build=lambda width: SmallResNet(width, 1), width=8, student=5)
    residual = dataclasses.replace(trained(network, data, 0, epochs=1), turn=0.0)
    start = residual.float_row()
    row, _ = residual.run(RECIPES["half-macs"])
    assert macs(0.5)(row, start)
    row, _ = residual.run(RECIPES["ptq"])
    assert row.file_bytes < start.file_bytes


def test_a_trained_network_is_read_back(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "float.fxc"
    state = torch.random.get_rng_state()
    first = trained(SMALL, data, 3, epochs=1, path=path)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(P.Train, "run", None)
    again = trained(SMALL, data, 3, epochs=1, path=path)
    assert all(map(torch.equal, first.model.state_dict().values(), again.model.state_dict().values()))
    with pytest.raises(InputError, match="holds another network than resnet-20: delete it"):
        trained(NETWORKS["resnet-20"], data, 3, path=path)


def write_idx(path: Path, array: numpy.ndarray) -> None:
    head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    content = head + array.astype(numpy.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = numpy.random.default_rng(0)
    for part, count, ending in (("train", 70, ".gz"), ("t10k", 20, "")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", draw.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", numpy.arange(count) % 10)
    return tmp_path


def test_images_come_from_a_folder(folder: Path) -> None:
    found = load_data(str(folder))
    assert found.name == folder.name
    assert found.training.images.shape == (70, 1, 28, 28)
    assert found.test.labels.tolist() == [index % 10 for index in range(20)]
    assert abs(float(found.training.images.mean())) < 1e-4
    assert float(found.training.images.std()) == pytest.approx(1, abs=1e-4)
    pixels = numpy.random.default_rng(0).integers(0, 256, (70, 28, 28))
    order = torch.from_numpy(pixels).flatten().argsort(stable=True)
    assert (found.training.images.flatten()[order].diff() >= 0).all(), "brighter is larger, in the order of the file"
    assert load_data(str(folder), samples=64).training.images.shape == (64, 1, 28, 28)


def test_bad_data_is_told(folder: Path) -> None:
    with pytest.raises(InputError, match="there is no folder 'nowhere': data is 'mnist', 'fashion-mnist' or a folder"):
        load_data("nowhere")
    labels = folder / "t10k-labels-idx1-ubyte"
    write_idx(labels, numpy.arange(19))
    with pytest.raises(InputError, match="t10k files hold images of shape"):
        load_data(str(folder))
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(InputError, match="no complete file of 1 dimensions"):
        load_data(str(folder))
    labels.write_bytes(b"")
    with pytest.raises(InputError, match="no complete file of 1 dimensions"):
        load_data(str(folder))
    labels.unlink()
    with pytest.raises(InputError, match=r"has no file t10k-labels-idx1-ubyte\.gz or t10k-labels-idx1-ubyte"):
        load_data(str(folder))
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:500])
    with pytest.raises(InputError, match="cannot read"):
        load_data(str(folder))


# Text


@pytest.mark.parametrize("name", RECIPES)
def test_every_printed_pipeline_parses_to_what_runs(name: str) -> None:
    recipe = RECIPES[name]
    passes = parse(recipe.passes)
    assert recipe.sentence.endswith(".")
    assert parse("\n".join(pipeline_lines(recipe.passes))) == passes
    assert fxc.PassManager(recipe.passes).passes
    teacher = torch.nn.Identity()
    code = as_python(recipe)
    written = eval(code[code.index("    [") + 4 : code.index("    ],") + 5], {"P": P, "model": teacher})
    assert print_pipeline(list(written)) == print_pipeline(passes)
    assert all(getattr(item, "teacher", teacher) is teacher for item in written if recipe.student)
    compile(code, name, "exec")


def test_wrong_names_get_the_nearest_right_one() -> None:
    with pytest.raises(OptionError, match="no recipe 'unstructured-l2'; did you mean 'unstructured-l1'"):
        find_recipe("unstructured-l2")
    with pytest.raises(OptionError, match="no network 'resnet20' for recipes; did you mean 'resnet-20'"):
        find_network("resnet20")


# Figures


def row(recipe: str, seed: int, accuracy: float, milliseconds: float = 1.0) -> Row:
    return Row(recipe, "net", "images", seed, accuracy, 1000, 0.0, 5000, 4000, milliseconds, 2.0, 1.0, "fuse")


ROWS = [row("float", 0, 0.9), row("ptq", 0, 0.88), row("float", 1, 0.92), row("ptq", 1, 0.91, 0.5), row("qat", 2, 0.8)]


def test_figures_are_means_over_seeds_with_their_spread() -> None:
    start, ptq, qat = summarise(ROWS)
    assert (start.recipe, ptq.recipe, qat.recipe) == ("float", "ptq", "qat")
    assert ptq.accuracy == pytest.approx(0.895)
    assert (ptq.lowest, ptq.highest, ptq.seeds) == (0.88, 0.91, 2)
    assert ptq.spread == pytest.approx(0.015)
    assert ptq.lost == pytest.approx((0.02 + 0.01) / 2)
    assert (ptq.milliseconds, ptq.ratio) == (0.5, 4.0), "the shortest times: other work only adds to them"
    busy = [*ROWS[:-1], dataclasses.replace(ROWS[-1], float_milliseconds=9.0, milliseconds=3.0)]
    assert [one.ratio for one in summarise(busy)] == [2.0, 4.0, pytest.approx(2 / 3)]
    assert qat.lost is None
    shown = table(summarise(ROWS))
    assert list(shown.columns[3].cells) == ["91.00 ± 1.00 %", "89.50 ± 1.50 %", "80.00 %"]
    assert list(shown.columns[4].cells) == ["", "+1.50", ""]


def test_numbers_that_would_lie_on_each_other_stand_together() -> None:
    points = [(0.1, 0.9), (0.5, 0.9), (0.52, 0.88), (0.1, 0.5), (0.13, 0.91)]
    assert figures._together(points) == [[0, 4], [1, 2], [3]]


def test_the_plot_is_drawn_and_names_every_recipe(tmp_path: Path) -> None:
    plot(summarise(ROWS), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").stat().st_size > 5000
    with pytest.raises(OptionError, match="cannot write the plot"):
        plot(summarise(ROWS), tmp_path / "plot.nothing")
    with pytest.raises(OptionError, match="nothing to plot"):
        plot([], tmp_path / "plot.png")


# The command line


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fxcompress", "recipes", *arguments])
    try:
        cli.main()
        code: object = 0
    except SystemExit as leave:
        code = leave.code or 0
    output, errors = capsys.readouterr()
    assert isinstance(code, int)
    return code, output, errors


def test_recipes_are_listed_and_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = call(monkeypatch, capsys)
    assert code == 0
    for recipe in RECIPES.values():
        assert f"{recipe.name}{launch.remark(recipe)}\n    {recipe.sentence}\n" in output
    assert "several-processes  [torchrun --standalone --nproc_per_node 4 -m fxcompress recipes several" in output
    code, output, _ = call(monkeypatch, capsys, "--show", "qat")
    assert code == 0
    lines = output.splitlines()
    assert lines[0] == "qat"
    assert parse(lines[2]) == parse(RECIPES["qat"].passes)
    assert "P.QAT(train=P.Train(" in output
    assert "learning_rate=3e-05, schedule='cosine'" in output
    assert "unstructured" not in output


def test_recipes_run_and_write_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "median_seconds", lambda call, seconds: 1.0)
    monkeypatch.setitem(NETWORKS, "baby-cnn", SMALL)
    options = ("--epochs", "1", "--samples", "128", "--out", str(tmp_path))
    code, output, errors = call(monkeypatch, capsys, "ptq", "unstructured-l1", *options)
    assert (code, errors) == (0, "")
    assert "unstructured-l1 │ baby-cnn, mnist (128 images)" in output
    written = json.loads((tmp_path / "recipes.json").read_text())
    assert [one["recipe"] for one in written["results"]] == ["float", "ptq", "unstructured-l1"]
    assert {"command", "machine", "versions"} <= written.keys()
    assert (tmp_path / "recipes.png").exists()
    assert fxc.load(tmp_path / "ptq.fxc")(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("ptk",), "there is no recipe 'ptk'; did you mean 'ptq'"),
     (("--show", "distilation"), "did you mean 'distillation'"),
     (("ptq", "--network", "babycnn"), "did you mean 'baby-cnn'"),
     (("ptq", "--data", "no-such-folder"), "there is no folder 'no-such-folder'")],
)  # fmt: skip
def test_a_mistake_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, _, errors = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert errors.startswith("fxcompress: error: ")
    assert message in errors


def test_four_processes_make_one_network(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(fxc.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trial = launch.Trial("baby-cnn", "mnist", 0, 1, 64, tmp_path)
    launch.run([RECIPES["several-processes"]], trial)
    assert capfd.readouterr().out.count("wrote") == 2, "one process writes"
    start, found = json.loads((tmp_path / "several-processes.json").read_text())["results"]
    assert found["macs"] == pytest.approx(0.5 * start["macs"], rel=0.03)


def test_processes_that_fail_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(ProcessError, match="the 4 processes of 'several-processes' ended with an error"):
        launch.run([RECIPES["several-processes"]], launch.Trial("baby-cnn", "mnist", 0, 1, 64, tmp_path))
