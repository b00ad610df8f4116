"""Settings shared by all tests."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels then run on CPU tensors

torch.set_num_threads(1)  # the suite runs on several processes


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels for GPUs run: on a GPU, or on CPU tensors by Triton's interpreter. Returns the device."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("FXCOMPRESS_CUDA", "interpret")
    reason = _interpreter_fails()
    if reason:
        pytest.skip(reason)
    return "cpu"


@functools.cache
def _interpreter_fails() -> str | None:
    """Try a kernel with a loop: Triton 3.6 cannot interpret one with NumPy 2.4 or newer."""
    try:
        from fxcompress.emit.cuda import pointwise_launch

        pointwise_launch.mean(torch.ones(1, 1, 2, 2), None, None, {}).launch()
    except Exception as error:
        return f"Triton's interpreter does not work here: {error}"
    return None


settings.register_profile("quick", phases=(Phase.explicit, Phase.reuse, Phase.generate))  # reports without shrinking
