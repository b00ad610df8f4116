"""The command line: what it prints, what it writes, and one message with exit code 2 for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress as fxc
from fxcompress import cli
from fxcompress.pipeline import registry

MODEL_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 36, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(x.flatten(1))

def net():
    return Net()

def with_inputs():
    return Net(), torch.randn(2, 1, 8, 8)

def data():
    return [torch.randn(4, 1, 8, 8) for _ in range(2)]

def labelled():
    return [(torch.randn(4, 1, 8, 8), torch.randint(4, (4,)))]

batches = [torch.randn(4, 1, 8, 8) for _ in range(2)]
ready = Net()
ready_with_inputs = Net(), torch.randn(2, 1, 8, 8)

def nothing():
    return "text"

def broken():
    raise RuntimeError("no weights here")

def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branching(), torch.randn(2, 3)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zoo.py").write_text(MODEL_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "zoo", raising=False)
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fxcompress", *arguments])
        try:
            cli.main()
            code: Any = 0
        except SystemExit as leave:
            code = leave.code
        output, errors = capsys.readouterr()
        return code or 0, output, errors

    return call


def test_help_and_version(run: Run) -> None:
    code, output, _ = run("--help")
    assert code == 0
    assert all(word in output for word in ("demo", "recipes", "compress", "inspect", "bench", "passes"))
    assert run("--version")[1] == f"fxcompress {fxc.__version__}\n"


def test_the_module_can_be_run() -> None:
    environment = {"PYTHONPATH": str(Path(fxc.__file__).parents[1]), "PATH": ""}
    command = [sys.executable, "-m", "fxcompress", "compress", "nothing.py:nothing", "--out", "m.fxc"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fxcompress: error: nothing.py:nothing: there is no file")
    assert "Traceback" not in done.stderr


def test_compress_writes_the_artefact_and_every_kind_of_report(run: Run, folder: Path) -> None:
    passes = "prune-channels{ratio=0.5, scope=layer}, train, fuse, quantize"
    code, output, errors = run(
        "compress", "zoo.py:with_inputs", "--passes", passes, "--out", "m.fxc", "--calibration", "zoo.py:data",
        "--train-data", "zoo.py:labelled", "--report", "text", "--report", "r.json", "--report", "r.html",
        "--report", "r.txt",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    assert "pruned 8 -> 4" in output
    assert f"wrote m.fxc ({(folder / 'm.fxc').stat().st_size:,} bytes)" in output
    loaded = fxc.load(folder / "m.fxc")
    assert loaded(torch.randn(3, 1, 8, 8)).shape == (3, 4)
    report = fxc.Report.from_dict(json.loads((folder / "r.json").read_text()))
    assert report.after.parameters < 0.6 * report.before.parameters
    assert "pruned 8 -> 4" in (folder / "r.txt").read_text()
    assert "pruned 8 -&gt; 4" in (folder / "r.html").read_text()
    assert loaded.report is not None
    assert loaded.report.layers == report.layers


def test_random_calibration_and_random_weights_are_said_loudly(run: Run) -> None:
    code, _, errors = run("compress", "squeezenet1_1", "--input-shape", "1,3,64,64", "--out", "m.fxc", "--passes",
                          "int8", "--calibration", "random", "--no-verify")  # fmt: skip
    assert code == 0
    assert "warning: calibration with random noise" in errors
    assert "warning: squeezenet1_1 has random weights" in errors


def test_inspect_shows_graph_costs_and_reasons(run: Run) -> None:
    code, output, _ = run("inspect", "zoo.py:net", "--input-shape", "2,1,8,8", "--explain")
    assert code == 0
    assert "module conv: Conv2d(1, 8" in output
    assert "f32[2,8,6,6]" in output
    assert "bn [fold-batch-norm]: yes: batch norm folded into conv" in output


def test_inspect_measures_what_pruning_would_hurt(run: Run, folder: Path) -> None:
    code, output, errors = run("inspect", "zoo.py:with_inputs", "--sensitivity", "--validation", "zoo.py:labelled",
                               "--plot", "s.png", "--json", "s.json")  # fmt: skip
    assert (code, errors) == (0, "")
    assert "cross_entropy" in output
    written = json.loads((folder / "s.json").read_text())["results"]
    assert [(family["layer"], family["channels"]) for family in written["families"]] == [("conv", 8)]
    assert (folder / "s.png").stat().st_size > 1000
    code, output, _ = run("inspect", "zoo.py:with_inputs", "--sensitivity", "--calibration", "zoo.py:data")
    assert code == 0
    assert "relative squared error" in output


def test_an_artefact_can_be_inspected_and_timed(run: Run, folder: Path) -> None:
    run("compress", "zoo.py:with_inputs", "--passes", "fuse", "--out", "m.fxc")
    assert "Conv2d(1, 8" in run("inspect", "m.fxc")[1]
    code, output, _ = run("bench", "m.fxc", "--batch", "1,3", "--rounds", "1", "--seconds", "0.01", "--threads", "1",
                          "--json", "b.json")  # fmt: skip
    assert code == 0
    assert "artefact" in output
    written = json.loads((folder / "b.json").read_text())
    assert written["command"].startswith("fxcompress bench m.fxc")
    assert {"python", "torch", "fxcompress"} <= written["versions"].keys()
    assert written["machine"]["cores"] >= 1
    timings = written["results"][0]["timings"]
    assert [timing["batch"] for timing in timings] == [1, 3]
    assert all(timing["error"] is None and timing["median"] > 0 for timing in timings)


def test_engines_and_layers_are_compared(run: Run, folder: Path) -> None:
    code, output, _ = run(
        "bench",
        "zoo.py:with_inputs",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--threads",
        "1",
        "--peers",
        "torch-ao",
        "--layers",
        "--plot",
        "b.png",
        "--json",
        "b.json",
    )
    assert code == 0
    assert "torch.ao int8" in output
    assert re.search(r"batch 2: fxcompress \(int8\) takes \d+\.\d\d of the time of the best other", output)
    assert "of the peak" in output
    written = json.loads((folder / "b.json").read_text())["results"][0]
    assert [timing["engine"] for timing in written["timings"]] == ["float", "torch.ao int8", "fxcompress (int8)"]
    assert all(timing["sqnr_db"] > 20 for timing in written["timings"][1:])
    assert written["against_best_peer"]["2"] > 0
    assert {"conv", "fc"} <= {layer["layer"] for layer in written["layers"][0]["layers"]}
    assert (folder / "b.png").stat().st_size > 1000


def test_passes_lists_every_pass_with_its_options(run: Run) -> None:
    code, output, _ = run("passes")
    assert code == 0
    for name in registry.names():
        assert f"{name}  [{registry.find(name).contract}; " in output
    assert "    ratio: float | None = None" in output
    assert "    calibration: data, given in Python" in output
    assert "small-int8: " in output


@pytest.mark.parametrize("data", ["zoo.py:batches", "zoo.py:data"])
@pytest.mark.parametrize("model", [("zoo.py:ready_with_inputs",), ("zoo.py:ready", "--input-shape", "2,1,8,8")])
def test_values_of_a_file_do_as_functions_do(run: Run, folder: Path, model: tuple[str, ...], data: str) -> None:
    code, _, errors = run("compress", *model, "--passes", "int8", "--out", "m.fxc", "--calibration", data)
    assert (code, errors) == (0, "")
    assert (folder / "m.fxc").is_file()


MISTAKES = {
    "unknown model": (("inspect", "resnt18"), r"'resnt18' is no torchvision model.*did you mean 'resnet"),
    "unknown pass": (("compress", "zoo.py:with_inputs", "--passes", "fus", "--out", "m"), "did you mean 'fuse'"),
    "unknown option": (
        ("compress", "zoo.py:with_inputs", "--passes", "prune-channels{rato=0.5}", "--out", "m"),
        "did you mean 'ratio'",
    ),
    "impossible order": (
        ("compress", "zoo.py:with_inputs", "--passes", "quantize, fuse", "--calibration", "random", "--out", "m"),
        "This order would do",
    ),
    "no calibration": (("compress", "zoo.py:with_inputs", "--out", "m.fxc"), "give --calibration"),
    "no data for the sensitivity": (("inspect", "zoo.py:with_inputs", "--sensitivity"), "needs data: --calibration"),
    "no training data": (
        ("compress", "zoo.py:with_inputs", "--passes", "train", "--out", "m.fxc"), "give --train-data",
    ),
    "no data to quantise with training": (
        ("compress", "zoo.py:with_inputs", "--passes", "qat", "--out", "m.fxc"), "give --train-data",
    ),
    "no such file": (("inspect", "no.py:net"), "there is no file"),
    "no such function": (("inspect", "zoo.py:nett"), "zoo.py has no function or value 'nett'; did you mean 'net'"),
    "no module": (("inspect", "zoo.py:nothing"), "returned a str"),
    "raises": (("inspect", "zoo.py:broken"), "raised RuntimeError: no weights here"),
    "no shape": (("inspect", "zoo.py:net"), "give --input-shape"),
    "bad shape": (("inspect", "zoo.py:net", "--input-shape", "1,a"), "such as 1,3,224,224"),
    "shape that does not fit": (("inspect", "zoo.py:net", "--input-shape", "1,3,8,8"), r"raises on|cannot run"),
    "untraceable": (("inspect", "zoo.py:branching"), r"cannot be traced: control flow at .*zoo\.py:\d+"),
    "no artefact": (("bench", "no.fxc"), "cannot load 'no.fxc'"),
    "bad batch": (("bench", "resnet18", "--batch", "1,x"), "such as 1,16"),
    "unknown engine": (("bench", "resnet18", "--peers", "onnx"), "no engine 'onnx' to compare with; did you mean"),
    "bad report": (("compress", "zoo.py:with_inputs", "--out", "m", "--report", "r.pdf"), r"\.txt, \.json or \.html"),
    "bad weights": (("inspect", "resnet18", "--weights", "zoo.py"), "holds no weights for this model"),
    "unwritable": (
        ("compress", "zoo.py:with_inputs", "--passes", "fuse", "--out", "no/such/folder/m.fxc"), "cannot write",
    ),
    "bad target": (
        ("compress", "zoo.py:with_inputs", "--passes", "fuse", "--out", "m", "--target", "tpu"), "target must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(run: Run, name: str, folder: Path) -> None:
    arguments, message = MISTAKES[name]
    code, _, errors = run(*arguments)
    assert code == 2
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if line.startswith("fxcompress: error: ")]
    assert re.search(message, line), line
    assert [path.name for path in folder.iterdir() if path.suffix == ".fxc"] == []


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [("torchvision", ("inspect", "resnet18"), "models"), ("mlxtend", ("demo", "--out", "d"), "demo"),
     ("matplotlib", ("compress", "zoo.py:with_inputs", "--passes", "fuse", "--out", "m.fxc", "--report", "r.html"),
      "plot")],
)  # fmt: skip
def test_a_missing_extra_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, package: str, arguments: tuple[str, ...], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, _, errors = run(*arguments)
    assert code == 2
    assert f"pip install 'fxcompress[{extra}]'" in errors
