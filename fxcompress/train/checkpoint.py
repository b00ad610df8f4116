"""Checkpoints: files from which a training that was interrupted goes on exactly, written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxcompress import processes
from fxcompress.errors import CheckpointError
from fxcompress.graph import edit
from fxcompress.graph.printer import print_graph
from fxcompress.graph.regions import regions
from fxcompress.train.data import digest_of
from fxcompress.train.sharding import split_like, whole

FORMAT = 1

#: What a run is, in words, tensors' digests and numbers. Checkpoints are of one run.
Fingerprint = dict[str, Any]


@dataclass(frozen=True)
class CheckpointFile:
    """The file of one training. It holds the last checkpoint only.

    path: of the file. fingerprint: of the run.
    """

    path: Path
    fingerprint: Fingerprint

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file; of several processes the first one writes.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not processes.is_main():
            return
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save({"format": FORMAT, "fingerprint": self.fingerprint, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.path)
        except (OSError, RuntimeError, pickle.PicklingError) as error:
            raise CheckpointError(f"cannot write the checkpoint {str(self.path)!r}: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def read(self) -> dict[str, Any] | None:
        """Return the state that was written last, or None if there is no file. Nothing in the file is executed.

        Raises:
            CheckpointError: it is damaged, or of another run; the message names what differs.
        """
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            version, fingerprint, state = found["format"], found["fingerprint"], found["state"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError,
                zipfile.BadZipFile) as error:  # fmt: skip
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{str(self.path)!r} is damaged or no checkpoint ({reason}); delete it to start anew"
            ) from error
        if version != FORMAT:
            raise CheckpointError(f"{str(self.path)!r} has format {version}, this version writes {FORMAT}")
        differences = compare(fingerprint, self.fingerprint)
        if differences:
            raise CheckpointError(
                f"the checkpoint {str(self.path)!r} is of another run: {'; '.join(differences)}. Give another folder, "
                f"or delete the file to start anew"
            )
        loaded: dict[str, Any] = state
        return loaded


def fingerprint(module: fx.GraphModule, text: str, batches: int | None) -> Fingerprint:
    """Return what a training starts from: its options, its graph and weights, and how much data and processes it has.

    Args:
        module: before the training. text: the pass. batches: in an epoch, if known.
    """
    graphs = [module, *(region.graph_module for region in regions(module))]
    return {
        "pass": text,
        "graph": "\n".join(print_graph(graph, shapes=False) for graph in graphs),
        "tensors": {name: digest_of(tensor) for name, tensor in module.state_dict().items() if _is_tensor(tensor)},
        "batches": batches,
        "processes": processes.count(),
    }


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def compare(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return in words what differs between a checkpoint's run and this one; an empty list if nothing does."""
    found = []
    if old["pass"] != new["pass"]:
        found.append(f"its pass is {old['pass']!r}, here it is {new['pass']!r}")
    if old["graph"] != new["graph"]:
        pairs = zip(old["graph"].split("\n"), new["graph"].split("\n"), strict=False)
        line = next((f"{a.strip()!r}, here {b.strip()!r}" for a, b in pairs if a != b), "it has another length")
        found.append(f"the graph differs ({line})")
    elif old["tensors"] != new["tensors"]:
        names = [name for name in new["tensors"] if old["tensors"].get(name) != new["tensors"][name]]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(f"it began with other values of {names[0] if names else 'its tensors'}{more}")
    for name, what in (("batches", "batches in an epoch"), ("processes", "processes")):
        if old[name] != new[name]:
            found.append(f"it had {old[name]} {what}, here there are {new[name]}")
    return found


def tensors_of(module: nn.Module) -> dict[str, Any]:
    """Return a copy of a module's state dict, of whole tensors."""
    return {
        name: whole(value.detach()).clone() if isinstance(value, torch.Tensor) else value
        for name, value in module.state_dict().items()
    }


def load_tensors(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a state dict of whole tensors; buffers that have another shape by now get that of the state."""
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        saved = state.get(name)
        if isinstance(saved, torch.Tensor) and saved.shape != buffer.shape:
            holder, attribute = edit.owner(module, name)
            holder._buffers[attribute] = buffer.new_empty(saved.shape)
    current = module.state_dict()
    module.load_state_dict(
        {name: split_like(value, current[name]) if name in current else value for name, value in state.items()}
    )
