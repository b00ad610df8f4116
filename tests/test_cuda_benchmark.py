"""The benchmark of GPUs: rows, resuming, time limits and figures, tried out on the CPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "cuda_latency.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    specification = importlib.util.spec_from_file_location("cuda_latency", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["cuda_latency"] = module
    specification.loader.exec_module(module)
    return module


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the program in this process; it starts others for the engines."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
    benchmark.main()


def test_it_measures_resumes_and_draws(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    out, picture = tmp_path / "found" / "cuda.json", tmp_path / "cuda.png"
    shared = ["--device", "cpu", "--models", "squeezenet1_1", "--size", "48", "--turn", "0.05", "--json", str(out)]
    run(benchmark, monkeypatch, *shared, "--engines", "eager fp16", "--batches", "2", "--plot", str(picture))
    made = json.loads(out.read_text())
    assert {"command", "machine", "versions", "card", "results"} <= made.keys()
    (row,) = made["results"]["rows"]
    assert row["milliseconds"] > 0
    assert row["sqnr_db"] > 100
    assert picture.stat().st_size > 1000
    capsys.readouterr()
    run(benchmark, monkeypatch, *shared, "--engines", "eager fp16", "torchao int8", "--batches", "2", "1")
    told = capsys.readouterr().out.split("no GPU")[0]
    assert told.startswith("squeezenet1_1, batch 1, eager fp16: ")
    assert len(told.strip().splitlines()) == 1, "what was measured, and what does not suit the network, is left out"
    kept = {line["batch"]: line for line in json.loads(out.read_text())["results"]["rows"]}
    assert kept[2] == row
    assert kept[1]["milliseconds"] > 0


def test_without_a_gpu_it_says_so(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds no GPU"):
        run(benchmark, monkeypatch, "--seconds", "1")


def test_an_engine_that_hangs_or_dies_is_ended_and_told(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(device="cpu", size=32, turn=0.01)
    program = tmp_path / "worker.py"
    row = json.dumps({"model": "m", "engine": "e", "batch": 1, "milliseconds": 5.0})
    monkeypatch.setattr(benchmark, "__file__", str(program))
    program.write_text(f"import time\nprint('ROW ' + {row!r}, flush=True)\ntime.sleep(60)\n")
    begun = time.perf_counter()
    rows = list(benchmark.measure_in_process("m", "e", [1, 2], options, 2.0))
    assert time.perf_counter() - begun < 20
    assert [(one.batch, one.milliseconds, one.error) for one in rows] == [(1, 5.0, None), (2, None, "not done in 2 s")]
    program.write_text("raise SystemExit('CUDA error: an illegal memory access was encountered')\n")
    (row_of_the_dead,) = benchmark.measure_in_process("m", "e", [1], options, 20.0)
    assert "illegal memory access" in row_of_the_dead.error


def test_figures(benchmark: Any) -> None:
    def row(model: str, engine: str, batch: int, milliseconds: float | None) -> Any:
        return benchmark.Row(model, engine, batch, milliseconds)

    rows = [
        row("resnet50", "eager fp16", 256, 20.0), row("resnet50", "torch.compile fp16", 256, 16.0),
        row("resnet50", "fxcompress int8", 256, 8.0), row("resnet50", "fxcompress fp16", 256, 14.0),
        row("resnet50", "fxcompress half int8", 256, 4.8),
        row("vit_b_16", "eager fp16", 1, 3.0), row("vit_b_16", "torch.compile fp16", 1, 4.0),
        row("vit_b_16", "fxcompress fp16", 1, 3.0), row("vit_b_16", "fxcompress int8", 1, None),
        row("mobilenet_v2", "eager fp16", 1, 3.0), row("mobilenet_v2", "fxcompress fp16", 1, 1.0),
    ]  # fmt: skip
    found = benchmark.summary(rows)
    assert found["against_baselines"] == {"resnet50, batch 256": 0.5, "vit_b_16, batch 1": 1.0}
    assert found["geometric_mean"] == 0.707
    assert found["largest"] == 1.0
    assert found["int8_resnet50_256_over_torch_compile"] == 0.5
    assert found["half_resnet50_256_over_whole_int8"] == 0.6
    assert "half_resnet50_256_over_whole_fp16" not in found
