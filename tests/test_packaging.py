"""The installed package: complete, typed, licensed, and able to compile a model far from the checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import fxcompress

pytestmark = pytest.mark.xdist_group("packaging")  # the fixtures of this file are made once

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_the_package_is_listed() -> None:
    """A package that is missing from the list is silently missing from the wheel."""
    on_disk = {"fxcompress.passes"}
    for file in (ROOT / "fxcompress").rglob("__init__.py"):
        if "passes" not in file.relative_to(ROOT).parts:
            on_disk.add(".".join(file.parent.relative_to(ROOT).parts))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk
    holding_code = {file.parent for file in (ROOT / "fxcompress").rglob("*.py") if "passes" not in file.parts}
    assert all((folder / "__init__.py").exists() for folder in holding_code)


def test_passes_is_flat_and_found_by_a_relative_link() -> None:
    assert os.readlink(ROOT / "fxcompress" / "passes") == os.path.join("..", "passes")
    assert [path.name for path in (ROOT / "passes").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_a_second_copy_of_the_passes_cannot_be_imported() -> None:
    specification = importlib.util.spec_from_file_location("passes", ROOT / "passes" / "__init__.py")
    assert specification is not None
    assert specification.loader is not None
    with pytest.raises(ImportError, match=r"import this package as fxcompress\.passes"):
        specification.loader.exec_module(importlib.util.module_from_spec(specification))


def test_one_version_everywhere() -> None:
    assert PROJECT["project"]["version"] == fxcompress.__version__


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_ci_makes_and_removes_an_environment_of_its_own() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "trap 'rm -rf .ci-venv' EXIT" in text
    command = re.search(r"```bash\n(pip install -e '\.\[test\]') && (.*)\n```", (ROOT / "README.md").read_text())
    assert command is not None, "the README gives one command that installs and tests"
    assert command[1] in text
    assert text.rstrip().endswith(command[2]), "and .ci/run ends with the same one"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from an sdist made from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fxcompress", "passes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."], cwd=folder)
    [made] = (folder / "dist").glob("*.whl")
    return made


def _run(command: list[str], cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    clean["OMP_NUM_THREADS"] = "1"  # other tests run beside this one
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT)) for path in (ROOT / "fxcompress").glob("**/*.py") if "passes" not in path.parts
    }
    expected |= {f"fxcompress/{path.relative_to(ROOT)}" for path in (ROOT / "passes").glob("*.py")}
    assert expected <= names
    assert "fxcompress/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "passes/"))]


PROGRAM = """
import pathlib, sys
import torch
from torch import nn
import fxcompress as fxc
from fxcompress import passes as P

here = pathlib.Path(sys.prefix).resolve()
assert here in pathlib.Path(fxc.__file__).resolve().parents, fxc.__file__
assert here in pathlib.Path(P.__file__).resolve().parents, P.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(),
                      nn.Linear(16 * 16, 10)).eval()
x = torch.randn(4, 3, 8, 8)
passes = [P.PruneChannels(0.5, scope="layer"), P.Fuse(), P.Quantize(calibration=x)]
compact = fxc.compile(model, passes, example_inputs=x)
compact.save("model.fxc")
assert torch.equal(fxc.load("model.fxc")(x), compact(x))
assert compact.report.after.parameters < 0.6 * compact.report.before.parameters
print("compiled", fxc.__version__)
"""


def test_an_installed_wheel_compiles_a_model_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """An environment of its own, which holds fxcompress and borrows torch from the one of the tests."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    _run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)], tmp_path
    )
    borrowed = sysconfig.get_paths()["purelib"]
    output = _run([str(python), "-c", PROGRAM], tmp_path, PYTHONPATH=borrowed)
    assert output.split() == ["compiled", fxcompress.__version__]
    version = _run([str(environment / "bin" / "fxcompress"), "--version"], tmp_path, PYTHONPATH=borrowed)
    assert version.strip() == f"fxcompress {fxcompress.__version__}"
