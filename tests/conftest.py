"""Settings shared by all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels then run on CPU tensors

torch.set_num_threads(1)  # the suite runs on several processes

settings.register_profile("quick", phases=(Phase.explicit, Phase.reuse, Phase.generate))  # reports without shrinking
