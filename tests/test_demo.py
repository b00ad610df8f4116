"""The demo keeps its promises on real digits; timings are shown and decide nothing here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

import fxcompress as fxc
from fxcompress import demo

pytestmark = pytest.mark.xdist_group("demo")  # the fixtures of this file are made once


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One short run of the demo."""
    out = tmp_path_factory.mktemp("demo")
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr(Console, "print", lambda self, *texts, **options: printed.extend(map(_text, texts)))
    figures = demo.run(out, epochs=2, finetune=2)
    capture.undo()
    return out, figures, "\n".join(printed)


def _text(shown: object) -> str:
    if isinstance(shown, Table):
        columns = [list(column.cells) for column in shown.columns]
        return "\n".join(" ".join(map(str, row)) for row in zip(*columns, strict=True))
    return str(shown)


def test_the_small_network_is_small_and_as_accurate(finished: tuple[Path, dict[str, Any], str]) -> None:
    rows = {row["name"]: row for row in finished[1]["rows"]}
    assert list(rows) == ["float", "pruned", "int8"]
    assert rows["float"]["accuracy"] > 0.95
    assert rows["int8"]["accuracy"] >= rows["float"]["accuracy"] - 0.01
    assert rows["int8"]["parameters"] <= rows["float"]["parameters"] / 4
    assert rows["int8"]["file_bytes"] <= rows["float"]["file_bytes"] / 10
    assert rows["int8"]["macs"] == rows["pruned"]["macs"] < rows["float"]["macs"]
    for row in rows.values():
        assert set(row["milliseconds"]) == {"1", "64"}
        assert all(value > 0 for value in row["milliseconds"].values())


def test_the_table_names_every_figure(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, figures, printed = finished
    for row in figures["rows"]:
        [line] = [line for line in printed.splitlines() if line.startswith(row["name"])]
        assert f"{100 * row['accuracy']:.1f} %" in line
        assert f"{row['file_bytes'] / 1e3:.1f} kB" in line
        assert len(re.findall(r"\d ms", line)) == 2
    assert "identical outputs" in printed


def test_files_are_written_and_load(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, figures, _ = finished
    assert json.loads((out / "figures.json").read_text())["results"] == figures["rows"]
    loaded = fxc.load(out / "int8.fxc")
    _, test = demo.load_digits(seed=0)
    assert demo.accuracy(loaded, test) == figures["rows"][2]["accuracy"]
    assert demo.accuracy(fxc.load(out / "float.fxc"), test) == figures["rows"][0]["accuracy"]
    assert (out / "int8.fxc").stat().st_size == figures["rows"][2]["file_bytes"]


def test_the_page_has_plots_and_every_layer(finished: tuple[Path, dict[str, Any], str]) -> None:
    page = (finished[0] / "report.html").read_text()
    for title in ("Accuracy against size", "Latency", "What each pass left", "Time per layer", "Training inside"):
        assert title in page
    assert page.count("<svg") == 5
    assert all(f"<code>{layer}</code>" in page for layer in ("conv1", "conv3", "fc1", "fc2"))
    assert re.search(r"pruned 160 -&gt; \d+", page)
    assert not re.search(r"<script|(src|href)=\"http", page), "the page loads nothing"


def test_digits_are_shuffled_split_and_scaled() -> None:
    training, test = demo.load_digits(seed=0)
    assert training.images.shape == (4000, 1, 28, 28)
    assert test.images.shape == (1000, 1, 28, 28)
    assert torch.bincount(test.labels).min() > 70, "every digit is in the test set"
    assert abs(training.images.mean().item()) < 0.05
    assert abs(training.images.std().item() - 1) < 0.05
    again, _ = demo.load_digits(seed=0)
    assert torch.equal(again.images, training.images)
    other, _ = demo.load_digits(seed=1)
    assert not torch.equal(other.labels, training.labels)


def test_batches_come_in_a_new_order_every_epoch() -> None:
    digits = demo.Digits(torch.zeros(10, 1, 28, 28), torch.arange(10))
    data = demo.Shuffled(digits, 4, seed=3)
    first, second = (torch.cat([labels for _, labels in data]) for _ in range(2))
    assert len(data) == 3
    assert not torch.equal(first, second)
    assert first.sort().values.equal(second.sort().values)
    assert torch.cat([labels for _, labels in demo.Shuffled(digits, 4, seed=3)]).equal(first)
