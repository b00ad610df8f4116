"""The HTML report: everything that the report says is on the page, whatever is in it, and nothing is loaded."""

from __future__ import annotations

import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fxcompress.errors import MissingExtraError, UnsupportedError
from fxcompress.report import LayerLine, PassLine, Report, Totals
from fxcompress.report_page import page

REPORT = Report(
    "Net",
    Totals(1000, 20000, 4000, 7),
    Totals(250, 5000, 300, 9),
    (
        PassLine("prune-channels{ratio=0.5}", "approximate", 0.1234, True, 8, 250, 5000, 1000),
        PassLine("fuse", "exact", 0.01, True, 2, 250, 5000, 1000, 1.5e-7, {"loss": [0.5, 0.25]}),
        PassLine("quantize", "approximate", 0.2, False, 0, 250, 5000, 300),
    ),
    (LayerLine("conv1", "conv", (900, 200), (20000, 5000), (3600, 200), ("pruned 64 -> 32", "int8")),),
    ("captured in training mode",),
    measurements={
        "rows": [
            {"name": "float", "accuracy": 0.98, "parameters": 1000, "macs": 20000, "file_bytes": 4096,
             "milliseconds": {"1": 2.0, "64": 8.0}},
            {"name": "int8", "accuracy": 0.97, "parameters": 250, "macs": 5000, "file_bytes": 512,
             "milliseconds": {"1": 1.0, "64": 2.0}},
        ],
        "layers": {"conv1": [0.5, 0.1]},
    },
)  # fmt: skip


class _Balance(HTMLParser):
    """Counts the tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_figure_is_on_the_page() -> None:
    text = page(REPORT)
    for shown in ("4.0x fewer", "13.3x fewer", "1.3x more", "0.123", "1.5e-07", "pruned 64 -&gt; 32", "98.0 %",
                  "captured in training mode", "900 -&gt; 200", "4,096"):  # fmt: skip
        assert shown in text.replace("->", "-&gt;"), shown
    assert text.count("<svg") == 5


def test_the_page_is_well_formed() -> None:
    balance = _Balance()
    balance.feed(page(REPORT))
    assert balance.open == []


def test_the_same_report_gives_the_same_page() -> None:
    assert page(REPORT) == page(REPORT)


def test_nothing_in_a_report_becomes_markup() -> None:
    harm = "<script>alert(1)</script>"
    layer = replace(REPORT.layers[0], layer=harm, kind=harm, notes=(harm,))
    first = replace(REPORT.passes[0], name=harm)
    rows = [{**row, "name": harm} for row in REPORT.measurements["rows"]]
    hostile = replace(REPORT, model=harm, layers=(layer,), passes=(first,), notes=(harm,),
                      measurements={"rows": rows, "layers": {harm: [1.0, 2.0]}})  # fmt: skip
    assert "<script" not in page(hostile)


def test_a_report_without_measurements_or_passes_is_a_page() -> None:
    bare = Report("Net", Totals(0, 0, 0, 1), Totals(0, 0, 0, 1))
    assert "unchanged" in page(bare)
    assert "Plots" not in page(bare)


def test_the_file_is_written_with_its_folder(tmp_path: Path) -> None:
    path = REPORT.to_html(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == page(REPORT)
    with pytest.raises(UnsupportedError, match="cannot write the report"):
        REPORT.to_html(path / "below-a-file.html")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"fxcompress\[plot\]"):
        page(REPORT)
