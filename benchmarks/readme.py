"""Writes the tables of README.md from the results beside this file, so that every figure comes from a run.

python benchmarks/readme.py            # rewrite them
python benchmarks/readme.py --check    # exit code 1 if they are not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Document = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose first column is text and the others figures."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join(lines)


def origin(document: Document) -> str:
    """Say which command made the figures, on what."""
    machine, versions = document["machine"], document["versions"]
    return (
        f"Made by `{document['command']}` on {machine['cores']} cores of a machine with {machine['processor']}, "
        f"torch {versions['torch'].partition('+')[0]}, Python {versions['python']}."
    )


def demo(document: Document) -> str:
    """The demo's table."""
    rows = [
        [row["name"], f"{100 * row['accuracy']:.1f} %", f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f} M",
         f"{row['file_bytes'] / 1e3:.1f} kB", *(f"{row['milliseconds'][batch]:.2f} ms" for batch in ("1", "64"))]
        for row in document["results"]
    ]  # fmt: skip
    return table(["", "accuracy", "parameters", "MACs", "file", "batch 1", "batch 64"], rows)


def cpu_int8(document: Document) -> str:
    """Milliseconds of each engine, by model and batch size."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    engines: list[str] = []
    for result in document["results"]:
        for timing in result["timings"]:
            key = (result["workload"]["model"], timing["batch"])
            text = "fails" if timing["median"] is None else f"{1e3 * timing['median']:.2f}"
            rows.setdefault(key, {})[timing["engine"]] = text
            if timing["engine"] not in engines:
                engines.append(timing["engine"])
    body = [
        [f"{model}, batch {batch}", *(row.get(name, "") for name in engines)] for (model, batch), row in rows.items()
    ]
    return table(["ms", *engines], body)


def accuracy(document: Document) -> str:
    """What every recipe gave: means over the seeds, and half of the distance between the best and the worst."""
    body = []
    for row in document["results"]["summaries"]:
        lost = "" if row["lost"] is None or row["recipe"] == "float" else f"{100 * row['lost']:+.2f}"
        body.append(
            [f"{row['network']}, {row['recipe']}", f"{100 * row['accuracy']:.2f} ± {100 * row['spread']:.2f}", lost,
             f"{row['parameters'] / 1e3:.0f} k", f"{row['macs'] / 1e6:.2f} M", f"{row['file_bytes'] / 1e3:.0f} kB",
             f"{row['ratio']:.2f}"]
        )  # fmt: skip
    return table(["", "accuracy, %", "points lost", "parameters", "MACs", "file", "times as fast"], body)


def compile_time(document: Document) -> str:
    """Seconds of compiling, by model."""

    def words(name: str) -> str:
        kind, _, size = name.partition(" ")
        return {"chain": f"chain {size} blocks", "channels": f"{int(size or 0):,} channels"}.get(kind, name)

    body = [
        [words(row["name"]), f"{row['nodes']:,}",
         f"{row['trace']:.2f}", f"{sum(row['passes'].values()):.2f}", f"{row['total']:.2f}"]
        for row in document["results"]["rows"]
    ]  # fmt: skip
    return table(["", "nodes", "trace, s", "passes, s", "in all, s"], body)


def peers(document: Document) -> str:
    """Milliseconds of each engine with the decibels of its output, and our time over that of the fastest other."""
    made = cpu_int8(document).split("\n")
    ratios = {
        f"{result['workload']['model']}, batch {batch}": ratio
        for result in document["results"] for batch, ratio in result["against_best_peer"].items()
    }  # fmt: skip
    lines = [f"{made[0]} ours / best other |", f"{made[1]} ---: |"]
    for line in made[2:]:
        lines.append(f"{line} {ratios[line.split(' | ')[0].removeprefix('| ')]:.2f} |")
    return "\n".join(lines)


def memory(document: Document) -> str:
    """Megabytes of each engine, by model."""
    body = [
        [row["model"], row["engine"],
         *(f"{row[name]:.1f}" if name in row else "" for name in ("loading", "running", "code", "needed"))]
        for row in document["results"]
    ]  # fmt: skip
    return table(["MB", "", "from loading on", "while running", "of it, code", "needed"], body)


def soak(document: Document) -> str:
    """What changed over many calls, by model."""
    body = [
        [row["model"], f"{row['calls']:,}", *(f"{number:.1f}" for number in row["megabytes"]),
         "yes" if row["same_bits"] else "no", *(f"{number:.2f}" for number in row["milliseconds"])]
        for row in document["results"]
    ]  # fmt: skip
    return table(["", "calls", "MB, start", "MB, end", "same bits", "ms, first tenth", "ms, last tenth"], body)


def coverage(document: Document) -> str:
    """What became of all models of a family, and which ones keep more than 0.40 of their parameters."""
    body = []
    for family in ("torchvision", "timm"):
        rows = [row for row in document["results"]["rows"] if row["family"] == family]
        left = sorted(row["left"] for row in rows if row["left"] is not None)
        above = [row["name"] for row in rows if (row["left"] or 0) > 0.40]
        body.append(
            [family, str(len(rows)), str(sum(row["status"] == "ok" for row in rows)), f"{left[len(left) // 2]:.2f}",
             f"{max(row['difference'] or 0 for row in rows):.0e}", f"{max(row['seconds'] or 0 for row in rows):.0f}",
             ", ".join(above) or "none"]
        )  # fmt: skip
    head = [
        "",
        "models",
        "without a failure",
        "parameters left, median",
        "largest difference",
        "slowest, s",
        "above 0.40",
    ]
    return table(head, body)


TABLES: dict[str, Callable[[Document], str]] = {
    "demo": demo, "accuracy": accuracy, "coverage": coverage, "cpu_int8": cpu_int8, "cpu_peers": peers,
    "encoders": cpu_int8, "memory": memory, "soak": soak, "compile_time": compile_time,
}  # fmt: skip


def rewrite(text: str) -> str:
    """Return the README with every table made anew."""
    for name, make in TABLES.items():
        document = json.loads((RESULTS / f"{name}.json").read_text())
        made = f"<!-- table: {name} -->\n{make(document)}\n\n{origin(document)}\n<!-- end -->"
        pattern = rf"<!-- table: {name} -->\n.*?<!-- end -->"
        text, count = re.subn(pattern, lambda _, made=made: made, text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    made = rewrite(text)
    if options.check:
        sys.exit(text != made)
    path.write_text(made)


if __name__ == "__main__":
    main()
