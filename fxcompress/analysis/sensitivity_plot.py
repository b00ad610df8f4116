"""The plot of a sensitivity: a heat map, one row a family, one column a ratio."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fxcompress.analysis.sensitivity import Sensitivity
from fxcompress.errors import MissingExtraError, OptionError

#: Losses that grow by less than this share of the largest growth all have the lightest colour.
_FLOOR = 1e-4


def plot(measured: Sensitivity, path: Path, title: str = "") -> None:
    """Draw how much the loss grows, on a logarithmic scale of colours, into a .png, .svg or .pdf file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the file cannot be written, or there is nothing to draw.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "the plot of the sensitivity") from None
    if not measured.families:
        raise OptionError("no family of channels can be removed from this model: there is nothing to plot")
    losses = np.array([family.losses for family in measured.families], dtype=np.float64)
    growth = np.nan_to_num(losses - measured.baseline, nan=np.inf)
    top = float(growth[np.isfinite(growth)].max(initial=0.0)) or 1.0
    shown = np.clip(growth, _FLOOR * top, top)
    rows, columns = shown.shape
    figure = Figure(figsize=(3.4 + 0.62 * columns, 1.6 + 0.26 * rows), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shown, aspect="auto", cmap="YlGnBu", norm=LogNorm(_FLOOR * top, top), interpolation="nearest")
    axes.set_xticks(range(columns), [f"{step:.0%}" for step in measured.steps])
    axes.set_yticks(range(rows), [f"{family.layer} ({family.channels})" for family in measured.families], fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("share of the family's channels masked")
    for row in range(rows):
        for column in range(columns):
            dark = shown[row, column] > top * math.sqrt(_FLOOR)
            axes.text(
                column, row, _short(growth[row, column]), ha="center", va="center", fontsize=7,
                color="white" if dark else "#26323f",
            )  # fmt: skip
    axes.set_title(title or "Sensitivity of the families of channels", fontsize=11)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(f"growth of the {measured.measure} (from {measured.baseline:.3g})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write the plot {str(path)!r}: {error}") from error


def _short(value: float) -> str:
    """A number in four characters or so."""
    if not math.isfinite(value):
        return "inf"
    if abs(value) < 5e-4:
        return "0"
    if abs(value) >= 1000:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
