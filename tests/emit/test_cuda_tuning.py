"""Choosing by measuring: what is remembered, in memory and in files, and what happens where nothing can be measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxcompress.emit.cuda import tuning
from fxcompress.emit.cuda.tuning import Choice, Choices, Way


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times by the name that a way returns; those that have none fail."""
    times: dict[str, float] = {}

    def measured(run: Callable[[], str], rounds: int = 5) -> float:
        name = run()
        if name not in times:
            raise RuntimeError(f"{name} needs more memory than there is")
        return times[name]

    monkeypatch.setattr(tuning, "device_microseconds", measured)
    return times


def ways(*names: str) -> list[Way]:
    return [Way(name, lambda name=name: name) for name in names]  # type: ignore[misc]


def test_the_fastest_way_wins_and_is_remembered(clock: dict[str, float], tmp_path: Path) -> None:
    clock.update(a=3.0, b=1.0, c=2.0)
    choices = Choices(tmp_path / "kept" / "choices.json")
    found = choices.find("key", lambda: ways("a", "b", "c"), True)
    assert found == Choice("b", 1.0, (("b", 1.0), ("c", 2.0), ("a", 3.0)))
    clock.update(b=9.0)
    assert choices.find("key", lambda: ways("a", "b", "c"), True) == found
    choices.save()
    again = Choices(tmp_path / "kept" / "choices.json")
    assert again.find("key", lambda: ways("a", "b", "c"), True) == found
    assert again.find("other", lambda: ways("a", "b", "c"), True).name == "c"


def test_without_measuring_the_first_way_is_taken_and_forgotten(clock: dict[str, float], tmp_path: Path) -> None:
    clock.update(a=3.0, b=1.0)
    choices = Choices(tmp_path / "choices.json")
    assert choices.find("key", lambda: ways("a", "b"), False) == Choice("a")
    choices.save()
    assert not (tmp_path / "choices.json").exists()
    assert choices.find("key", lambda: ways("a", "b"), True).name == "b"


def test_ways_that_fail_are_passed_over(clock: dict[str, float]) -> None:
    clock.update(b=5.0)
    prepared: list[str] = []

    def fail() -> None:
        prepared.append("a")
        raise ValueError("does not compile")

    listed = [Way("a", lambda: "a", fail), *ways("b"), Way("c", lambda: "c", lambda: prepared.append("c"))]
    assert tuning.fastest(listed).name == "b"
    assert sorted(prepared) == ["a", "c"]
    with pytest.raises(RuntimeError, match="no way to compute this works: d needs more memory"):
        tuning.fastest(ways("d", "e"))


def test_writers_keep_what_others_have_written(clock: dict[str, float], tmp_path: Path) -> None:
    clock.update(a=1.0, b=2.0)
    path = tmp_path / "choices.json"
    first, second = Choices(path), Choices(path)
    first.find("one", lambda: ways("a", "b"), True)
    second.find("two", lambda: ways("b", "a"), True)
    first.save()
    second.save()
    assert set(json.loads(path.read_text())) == {"one", "two"}
    assert [file.name for file in tmp_path.iterdir()] == ["choices.json"]


def test_files_are_bounded(clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LIMIT", 3)
    clock.update(a=1.0, b=2.0)
    choices = Choices(tmp_path / "choices.json")
    for number in range(5):
        choices.find(str(number), lambda: ways("a", "b"), True)
        choices.save()
    assert list(Choices(tmp_path / "choices.json").known) == ["2", "3", "4"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"key": 3}', '{"key": ["a", "b", "c"]}', '{"key": ["a", 1]}'])
def test_files_that_are_none_are_ignored(text: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    assert Choices(path).known == {}


def test_a_folder_that_cannot_be_written_is_no_error(clock: dict[str, float], tmp_path: Path) -> None:
    clock.update(a=1.0, b=2.0)
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "choices.json")
    choices.find("key", lambda: ways("a", "b"), True)
    choices.save()


def test_measuring_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tuning.measures(torch.empty(0))
    if torch.cuda.is_available():
        assert tuning.measures(torch.empty(0, device="cuda"))
        monkeypatch.setenv(tuning.VARIABLE, "off")
        assert not tuning.measures(torch.empty(0, device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_longer_work_takes_longer() -> None:
    small, large = (torch.randn(size, size, device="cuda").half() for size in (512, 8192))
    short = tuning.device_microseconds(lambda: small @ small)
    long = tuning.device_microseconds(lambda: large @ large)
    assert 1.0 < short < long < 1e6
