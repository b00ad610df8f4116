"""Sums of weights, which are made piece by piece."""

from __future__ import annotations

import pytest
import torch

from fxcompress.emit import cpu_layers


@pytest.mark.parametrize("shape", [(5, 7), (1, 400), (0, 3), (3, 0), (9, 100)])
def test_sums_of_rows_are_those_of_all_at_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layers, "_ADDED_AT_ONCE", 300)  # two pieces and a rest, one for each row, or nothing
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    assert torch.equal(cpu_layers._row_sums(weight), weight.sum(1, dtype=torch.int64))
