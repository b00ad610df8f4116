"""Settings shared by all tests."""

from __future__ import annotations

import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)  # the suite runs on several processes

settings.register_profile("quick", phases=(Phase.explicit, Phase.reuse, Phase.generate))  # reports without shrinking
