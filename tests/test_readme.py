"""The README tells the truth: its code runs, its figures come from results, its names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxcompress as fxc
from fxcompress import errors
from fxcompress import passes as P
from fxcompress.cli import app
from fxcompress.pipeline import registry

pytestmark = pytest.mark.xdist_group("readme")  # the fixtures of this file are made once

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)


class Net(nn.Module):
    """What the reader's model may look like."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        logits: torch.Tensor = self.fc(x.flatten(1))
        return logits


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run every Python block in order, as one program of a reader who has a model and data."""
    torch.manual_seed(0)
    batches = [torch.randn(8, 1, 8, 8) for _ in range(2)]
    names: dict[str, Any] = {
        "model": Net().eval(),
        "x": torch.randn(2, 1, 8, 8),
        "batches": batches,
        "train_loader": [(batch, torch.randint(10, (8,))) for batch in batches],
        "test_loader": [(batch, torch.randint(10, (8,))) for batch in batches],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for language, code in BLOCKS:
            if language == "python":
                exec(compile(code, "README.md", "exec"), names)
        assert Path("model.fxc").exists()
    registry._REGISTERED.pop("clip-weights")
    return names


def test_the_first_program_makes_a_small_int8_module(namespace: dict[str, Any]) -> None:
    loaded = namespace["loaded"]
    assert isinstance(loaded, fxc.CompactModule)
    assert loaded.report is not None
    assert loaded.report.after.parameters < 0.6 * loaded.report.before.parameters
    assert namespace["y"].shape == (2, 10)


def test_pipelines_as_text_and_presets_do_what_they_say(namespace: dict[str, Any]) -> None:
    assert namespace["halved"].conv1.out_channels == 8
    assert any(parameter.dtype == torch.int8 for parameter in namespace["small"].buffers())


def test_the_pass_of_ones_own_has_ten_lines_and_works(namespace: dict[str, Any]) -> None:
    [code] = [code for language, code in BLOCKS if "class ClipWeights" in code]
    body = code[code.index("@fxc.register") : code.index("\n\n\nclipped")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 13, "three lines of head, ten of pass"
    module = namespace["clipped"]
    assert any(line.name == "clip-weights{limit=0.05}" and line.edits for line in module.report.passes)


def test_the_rule_for_a_module_of_ones_own_works(namespace: dict[str, Any]) -> None:
    layers = (nn.Conv2d(1, 8, 3), namespace["ChannelGain"](8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = nn.Sequential(*layers).eval()
    pruned = fxc.compile(model, "prune-channels{ratio=0.5}", namespace["x"])
    assert pruned.get_parameter("1.gain").shape == (4,)


def test_masks_of_torch_are_understood(namespace: dict[str, Any]) -> None:
    report = namespace["compact"].report
    assert report.after.parameters < report.before.parameters
    assert "pruned 16 -> 8" in str(report)


def test_every_command_exists_with_its_options() -> None:
    commands = [
        line for language, code in BLOCKS if language == "bash" for line in code.replace("\\\n", "").splitlines()
    ]
    called = [line.rpartition("fxcompress ")[2].split() for line in commands if "fxcompress " in line]
    assert {words[0] for words in called} == {"demo", "recipes", "compress", "inspect", "bench", "passes"}
    for words in called:
        shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"}, color=False).output
        for word in words:
            assert not word.startswith("--") or word in shown, (words[0], word)


def test_every_name_in_the_text_exists() -> None:
    for name in re.findall(r"`P\.(\w+)", PROSE):
        assert hasattr(P, name), name
    for name in re.findall(r"`fxc\.errors\.(\w+)", PROSE):
        assert hasattr(errors, name), name
    for name in re.findall(r"`fxc\.([a-z]\w+)\(", PROSE):
        assert hasattr(fxc, name), name
    for name in re.findall(r"^\| `(\w+)\(", PROSE, flags=re.MULTILINE):
        assert hasattr(P, name), name
    for text in re.findall(r'"((?:prune-channels|fuse|mask-)[^"]*)"', TEXT):
        assert fxc.PassManager(text).passes


def test_every_table_comes_from_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], check=False)
    assert done.returncode == 0, "run python benchmarks/readme.py"


def test_links_and_folders_exist() -> None:
    for path in re.findall(r"`((?:fxcompress|passes|benchmarks|tests|\.ci)/[\w./]*)`", PROSE):
        assert (ROOT / path).exists(), path
    for word in ("`.ci/run`", "`readme.py`"):
        assert word in PROSE
