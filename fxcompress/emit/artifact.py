"""Saved modules: one file with the graph as JSON and the tensors, which `load` reads without running anything from it.

The file is a safetensors file (https://github.com/huggingface/safetensors), so other tools can read its tensors under
the names of the `state_dict` (weights of up to 4 bits stand two to a byte, see `nibbles.py`). Its `__metadata__` has
one entry, a JSON document with the version of the format, the graph, the layers and their constructor arguments, the
report, and the SHA-256 of the whole file (computed with zeros in its own place). What the document may name is decided
by `vocabulary.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
from torch import fx, nn

import fxcompress
from fxcompress import processes
from fxcompress.emit import nibbles
from fxcompress.emit.compact_module import CompactModule
from fxcompress.emit.encoding import GraphReader, check_name, check_path, decode, encode, encode_graph
from fxcompress.emit.vocabulary import Vocabulary
from fxcompress.errors import ArtifactError, UnsupportedError
from fxcompress.graph.metadata import GraphInfo, KernelChoices, Stage, graph_info
from fxcompress.report import Report

Json = Any

#: Raised when a file written now could be misunderstood by the reader of an earlier release.
FORMAT_VERSION = 1

_KEY = "fxcompress"
_NO_DIGEST = "0" * 64
_DIGEST_PREFIX = '\\"sha256\\": \\"'  # as it stands in the file: JSON inside a JSON string
_LONGEST = 90_000_000  # safetensors reads headers of up to 100 MB
_HOLDER = "Module"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# Writing


def save(
    module: fx.GraphModule,
    path: str | Path,
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    modules: Mapping[str, type[nn.Module]] | None = None,
) -> int:
    """Write a graph module to one file and return its size in bytes. See `CompactModule.save`."""
    if not processes.is_main():
        return 0
    _refuse_regions(module)
    vocabulary = Vocabulary.of(functions, modules)
    tensors: dict[str, torch.Tensor] = {}
    document = {
        "format_version": FORMAT_VERSION,
        "sha256": _NO_DIGEST,
        "written_by": {"fxcompress": fxcompress.__version__, "torch": torch.__version__},
        "class_name": check_name(type(module).__name__, "the class of the module"),
        "training": module.training,
        "modules": _describe_modules(module, vocabulary),
        "other_mode": _modules_in_other_mode(module),
        "tensors": _describe_tensors(module, tensors),
        "nodes": encode_graph(module.graph, vocabulary),
        **_describe_info(module, tensors),
        "report": _describe_report(getattr(module, "report", None)),
    }
    text = json.dumps(document, allow_nan=False)
    if len(text) > _LONGEST:
        raise ArtifactError(f"the graph is too large to be saved: {len(text):,} bytes, {_LONGEST:,} are the most")
    _rehearse(text, tensors, vocabulary)
    return _write(Path(path).resolve(), tensors, text)


def _refuse_regions(module: fx.GraphModule) -> None:
    inside = list(graph_info(module).regions)
    if inside:
        path = inside[0].split(".")[0]
        name = type(module.get_submodule(path)).__name__
        raise ArtifactError(
            f"layer {path!r} is Python code of the class {name}, which could not be traced and runs the graphs inside "
            f"it; a file cannot hold code. Keep the module with torch.save(module, path), where {name} can be imported"
        )


def _describe_modules(root: nn.Module, vocabulary: Vocabulary) -> dict[str, Json]:
    """Return type and constructor arguments of every layer that the graph calls, and the modules that hold them."""
    called = {str(node.target) for node in _nodes(root) if node.op == "call_module"}
    found: dict[str, Json] = {}
    first_path: dict[int, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        _refuse_hooks(module, path)
        if path in called and id(module) in first_path:
            found[path] = {"same_as": first_path[id(module)]}
            return
        if path in called:
            first_path[id(module)] = path
            described = vocabulary.describe_module(module, path)
            found[path] = {"type": described["type"], "config": encode(described["config"])}
            return
        if path:
            found[path] = {"type": _HOLDER}
        for name, child in module._modules.items():  # named_children() leaves out what it has seen under another name
            if child is not None:
                visit(child, check_path(f"{path}.{name}" if path else name, "a layer"))

    visit(root, "")
    return found


def _nodes(module: nn.Module) -> Iterator[fx.Node]:
    if isinstance(module, fx.GraphModule):
        yield from module.graph.nodes


def _modules_in_other_mode(root: nn.Module) -> list[str]:
    """Return the paths of the modules that are in training while the root is in evaluation, or the reverse."""
    modules = root.named_modules(remove_duplicate=False)
    return [path for path, module in modules if module.training != root.training]


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise ArtifactError(
            f"layer {path or 'the model itself'!r} has hooks, which are code that a file cannot hold; remove them first"
        )


def _describe_tensors(root: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Json]:
    """Put every parameter and buffer into `tensors`, tied ones once, and return what is to know about each path."""
    found: dict[str, Json] = {}
    first_path: dict[int, str] = {}
    storages: set[int] = set()
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            path = check_path(f"{prefix}.{name}" if prefix else name, "a tensor")
            found[path] = {"persistent": False} if name in module._non_persistent_buffers_set else {}
            if id(tensor) in first_path:
                found[path]["tied_to"] = first_path[id(tensor)]
                continue
            first_path[id(tensor)] = path
            found[path].update(_describe_tensor(tensor))
            tensors[path] = _plain(tensor, path)
            if nibbles.fits(tensors[path]):
                found[path]["nibbles"] = list(tensor.shape)
                tensors[path] = nibbles.pack(tensors[path])
            storage = tensors[path].untyped_storage().data_ptr()
            if storage in storages:  # two views of one memory, which are written apart
                tensors[path] = tensors[path].clone()
            storages.add(storage)
    return found


def _plain(tensor: torch.Tensor, path: str) -> torch.Tensor:
    if type(tensor.data) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_meta:
        raise ArtifactError(
            f"the tensor {path!r} is a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}; a file "
            f"holds plain dense tensors with data"
        )
    return tensor.detach().cpu().contiguous()


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Json]:
    record: dict[str, Json] = {}
    if isinstance(tensor, nn.Parameter):
        record["parameter"] = True
        if not tensor.requires_grad:
            record["frozen"] = True
    # Kernels choose their arithmetic by strides, and another arithmetic rounds differently: keep channels-last weights.
    usual = torch.empty(tensor.shape, device="meta").stride()
    if tensor.stride() != usual and _is_dense(tensor.shape, tensor.stride()):
        record["strides"] = list(tensor.stride())
    return record


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of this shape and these strides fills its memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _describe_info(module: fx.GraphModule, tensors: dict[str, torch.Tensor]) -> dict[str, Json]:
    known = graph_info(module)
    shapes = {path: parameter.shape for path, parameter in module.named_parameters()}
    masks: dict[str, Json] = {}
    for path, mask in known.masks.items():
        if shapes.get(path) != mask.shape:
            continue  # lowered since: nothing is trained there any more that could be held at zero
        bits = numpy.packbits(mask.detach().cpu().numpy().astype(bool).reshape(-1))
        tensors[f"mask:{path}"] = torch.from_numpy(bits)  # ":" cannot stand in the path of a parameter
        masks[path] = list(mask.shape)
    return {
        "stage": known.stage.value, "canonical": known.canonical, "notes": list(known.notes), "masks": masks,
        "kernels": _describe_kernels(known.kernels),
    }  # fmt: skip


def _describe_kernels(choices: KernelChoices | None) -> Json:
    if choices is None:
        return None
    return {"machine": choices.machine, "calls": sorted(choices.calls), "cuts": dict(choices.cuts)}


def _describe_report(report: Report | None) -> Json:
    return None if report is None else encode(report.to_dict(), special=str)


def _rehearse(text: str, tensors: dict[str, torch.Tensor], vocabulary: Vocabulary) -> None:
    """Rebuild the module from what is about to be written: what cannot be read must fail here, not after deployment."""
    try:
        _Reader(json.loads(text), tensors, vocabulary, torch.device("cpu")).read()
    except ArtifactError as error:
        raise ArtifactError(f"the module cannot be saved: {error}") from error.__cause__
    except Exception as error:  # from_config() of a caller's class may raise anything
        raise ArtifactError(
            f"the module cannot be saved: rebuilding it fails with {type(error).__name__}: {error}"
        ) from error


def _write(path: Path, tensors: dict[str, torch.Tensor], document: str) -> int:
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        unfinished.touch(exist_ok=False)
        mode = unfinished.stat().st_mode  # what the user's umask gives; safetensors would make the file private
        safetensors.torch.save_file(tensors, unfinished, metadata={_KEY: document})
        unfinished.chmod(mode)
        _stamp(unfinished)
        size = unfinished.stat().st_size
        os.replace(unfinished, path)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"cannot write {str(path)!r}: {error or type(error).__name__}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return size


def _stamp(path: Path) -> None:
    """Put the digest of the file into the place that is kept for it."""
    digest, position = _digest(path, _NO_DIGEST)
    with path.open("r+b") as file:
        file.seek(position)
        file.write(digest.encode())


def _digest(path: Path, stamped: str) -> tuple[str, int]:
    """Return the SHA-256 of the file with zeros in the place of the digest `stamped`, and that place."""
    with path.open("rb") as file:
        size = file.read(8)
        header = size + file.read(int.from_bytes(size, "little"))
        prefix = _DIGEST_PREFIX.encode()
        if header.count(prefix + stamped.encode()) != 1:
            raise ArtifactError(f"{str(path)!r} does not carry its checksum in the place for it")
        position = header.index(prefix) + len(prefix)
        found = hashlib.sha256(header[:position] + _NO_DIGEST.encode() + header[position + len(_NO_DIGEST) :])
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest(), position


# Reading


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    functions: Mapping[str, Callable[..., Any]] | None = None,
    modules: Mapping[str, type[nn.Module]] | None = None,
) -> CompactModule:
    """Read a module that `CompactModule.save` wrote. Nothing from the file is executed, and no class is needed.

    Args:
        path: the file.
        device: where the tensors go, and every device written in the graph.
        functions: functions of your own, by the names given to `save`.
        modules: layer classes of your own, by the names given to `save`.

    Raises:
        ArtifactError: the file is missing, truncated, altered, written by a newer version, or holds what it may not.
        UnsupportedError: there is no such device.
    """
    path, device = Path(path), _available(device)
    vocabulary = Vocabulary.of(functions, modules)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            document = _read_document(path, file)
            tensors = _read_tensors(path, file)
        return _Reader(document, tensors, vocabulary, device, path.stat().st_size).read()
    except ArtifactError as error:
        raise ArtifactError(f"cannot load {str(path)!r}: {error}") from error.__cause__
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"cannot load {str(path)!r}: missing, truncated or no fxcompress file ({error})") from error
    except Exception as error:  # whatever a hostile file makes torch or json raise, the caller sees one class of error
        raise ArtifactError(
            f"cannot load {str(path)!r}: its content makes no sense ({type(error).__name__}: {error})"
        ) from error


def _read_tensors(path: Path, file: Any) -> dict[str, torch.Tensor]:
    """Read every tensor of a file that safetensors has opened and checked.

    A tensor of safetensors is a window into the file, which follows whoever writes to it. These have memory of their
    own, and are not copied from the window: its pages would be in memory beside them as long as the file is open.
    """
    found: dict[str, torch.Tensor] = {}
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        places = json.loads(stream.read(start - 8))
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            found[name] = torch.empty_like(file.get_tensor(name))
            room = found[name].view(-1).view(torch.uint8).numpy()
            stream.seek(start + places[name]["data_offsets"][0])
            if stream.readinto(room.data) != room.nbytes:
                raise ArtifactError(f"the tensor {name!r} is cut off")
    return found


def _available(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, depending on how it was built
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedError(f"cannot load to device {str(device)!r}: {reason}") from error


def _read_document(path: Path, file: Any) -> dict[str, Json]:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise ArtifactError("a safetensors file, but not written by fxcompress")
    document: dict[str, Json] = _mapping(json.loads(text))
    version = document.get("format_version")
    if type(version) is not int:
        raise ArtifactError("it does not say which version of the format it has")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"it has version {version} of the format and this fxcompress {fxcompress.__version__} reads up to "
            f"{FORMAT_VERSION}; install a newer fxcompress"
        )
    stamped = document.get("sha256")
    if not isinstance(stamped, str) or re.fullmatch("[0-9a-f]{64}", stamped) is None:
        raise ArtifactError("it carries no checksum")
    if _digest(path, stamped)[0] != stamped:
        raise ArtifactError("its checksum does not fit its content: it was altered or damaged; fetch it again")
    missing = _FIELDS - document.keys()
    if missing:
        raise ArtifactError(f"it lacks {', '.join(sorted(missing))}")
    return document


_FIELDS = {
    "class_name", "training", "modules", "other_mode", "tensors", "nodes", "stage", "canonical", "notes", "masks",
    "report",
}  # fmt: skip


class _Reader:
    """Rebuilds a module from a document and the tensors beside it. What has been read is taken out of the document."""

    def __init__(
        self,
        document: dict[str, Json],
        tensors: dict[str, torch.Tensor],
        vocabulary: Vocabulary,
        device: torch.device,
        file_bytes: int | None = None,
    ) -> None:
        self.document, self.tensors, self.vocabulary, self.device = document, tensors, vocabulary, device
        self.file_bytes = file_bytes
        self.root = nn.Module()

    def read(self) -> CompactModule:
        report = self._report()
        self._build_modules(_mapping(self.document.pop("modules")))
        known_tensors = _mapping(self.document["tensors"])
        for path, record in known_tensors.items():
            self._place_tensor(check_path(path, "a tensor"), _mapping(record))
        for path, _ in (*self.root.named_parameters(), *self.root.named_buffers()):
            if path not in known_tensors:
                raise ArtifactError(f"the file lacks the tensor {path!r}")
        layers = dict(self.root.named_modules(remove_duplicate=False))
        reader = GraphReader(self.vocabulary, layers, known_tensors, self.device)
        graph = reader.read(self.document.pop("nodes"))
        graph.lint()
        name = check_name(self.document["class_name"], "a class")
        compact = CompactModule(self.root, graph, report, name)
        self._set_modes(compact)
        self._set_info(graph_info(compact))
        return compact

    def _build_modules(self, records: dict[str, Json]) -> None:
        built: dict[str, nn.Module] = {"": self.root}
        for path, record in records.items():
            parent, _, name = check_path(path, "a layer").rpartition(".")
            if parent not in built:
                raise ArtifactError(f"layer {path!r} stands before the module that holds it")
            built[path] = self._build_module(_mapping(record), path, built)
            built[parent].add_module(name, built[path])

    def _build_module(self, record: dict[str, Json], path: str, built: dict[str, nn.Module]) -> nn.Module:
        if "same_as" in record:
            other = built.get(record["same_as"])
            if other is None or type(other) is nn.Module:
                raise ArtifactError(f"layer {path!r} is said to be the same as one that does not stand before it")
            return other
        if record.get("type") == _HOLDER:
            return nn.Module()
        return self.vocabulary.build_module(record.get("type"), decode(record.get("config")), path)

    def _place_tensor(self, path: str, record: dict[str, Json]) -> None:
        prefix, _, name = path.rpartition(".")
        module = self.root.get_submodule(prefix)
        tensor = self._tied(record["tied_to"]) if "tied_to" in record else self._tensor(path, record)
        planned = module._parameters.get(name, module._buffers.get(name))
        if planned is None and (name in module._parameters or type(module) is not nn.Module):
            raise ArtifactError(f"the layer {prefix!r} has no tensor {name!r}")
        if planned is not None and planned.shape != tensor.shape:
            raise ArtifactError(f"the tensor {path!r} has shape {tuple(tensor.shape)}, not {tuple(planned.shape)}")
        if isinstance(tensor, nn.Parameter):
            if planned is None:
                module.register_parameter(name, tensor)
            else:
                setattr(module, name, tensor)  # recurrent layers keep a second list, which follows attributes only
        else:
            module.register_buffer(name, tensor, persistent=record.get("persistent") is not False)

    def _tied(self, other: Json) -> torch.Tensor:
        prefix, _, name = check_path(other, "a tied tensor").rpartition(".")
        module = self.root.get_submodule(prefix)
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is None or tensor.is_meta:
            raise ArtifactError(f"a tensor is tied to {other!r}, which does not stand before it")
        return tensor

    def _tensor(self, path: str, record: dict[str, Json]) -> torch.Tensor:
        if path not in self.tensors:
            raise ArtifactError(f"the file lacks the tensor {path!r}")
        tensor = self.tensors[path]
        if "nibbles" in record:
            tensor = _without_nibbles(tensor, record["nibbles"], path)
        if "strides" in record:
            tensor = _with_strides(tensor, record["strides"], path)
        tensor = tensor.to(self.device)
        return nn.Parameter(tensor, requires_grad="frozen" not in record) if record.get("parameter") else tensor

    def _set_modes(self, compact: CompactModule) -> None:
        training = bool(self.document["training"])
        other = set(map(str, self.document["other_mode"]))
        for path, module in compact.named_modules(remove_duplicate=False):
            module.training = training != (path in other)

    def _report(self) -> Report | None:
        found = self.document.pop("report")
        return None if found is None else replace(Report.from_dict(decode(found)), file_bytes=self.file_bytes)

    def _set_info(self, known: GraphInfo) -> None:
        known.stage = Stage(self.document["stage"])
        known.masks = {path: self._mask(path, shape) for path, shape in _mapping(self.document["masks"]).items()}
        known.notes = [str(note) for note in self.document["notes"]]
        known.canonical = bool(self.document["canonical"])
        known.kernels = self._kernels()

    def _kernels(self) -> KernelChoices | None:
        """What was measured to run fastest; files of earlier releases do not have it."""
        found = self.document.get("kernels")
        if found is None:
            return None
        machine, calls, cuts = (_mapping(found).get(name) for name in ("machine", "calls", "cuts"))
        cuts = _mapping(cuts)
        names: list[Any] = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(text, str) for text in (machine, *names)):
            raise ArtifactError(f"the file is not understood where it says {str(found)[:80]}")
        if not all(type(cut) is int and cut >= 0 for cut in cuts.values()):
            raise ArtifactError(f"the file is not understood where it says {str(cuts)[:80]}")
        return KernelChoices(str(machine), frozenset(names), cuts)

    def _mask(self, path: str, shape: Json) -> torch.Tensor:
        bits = self.tensors.get(f"mask:{check_path(path, 'a mask')}")
        parameter = self.root.get_parameter(path)
        if bits is None or list(parameter.shape) != shape or bits.numel() != (parameter.numel() + 7) // 8:
            raise ArtifactError(f"the mask of {path!r} does not fit its parameter")
        entries = numpy.unpackbits(bits.numpy(), count=parameter.numel()).astype(bool)
        return torch.from_numpy(entries).reshape(parameter.shape).to(self.device)


def _mapping(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise ArtifactError(f"the file is not understood where it says {str(value)[:80]}")
    return value


def _without_nibbles(tensor: torch.Tensor, shape: Json, path: str) -> torch.Tensor:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ArtifactError(f"the tensor {path!r} has a shape that is none: {str(shape)[:80]}")
    try:
        return nibbles.unpack(tensor, shape)
    except ValueError as error:
        raise ArtifactError(f"the tensor {path!r} does not fit its description: {error}") from error


def _with_strides(tensor: torch.Tensor, strides: Json, path: str) -> torch.Tensor:
    if (
        not isinstance(strides, list)
        or len(strides) != tensor.ndim
        or not all(type(stride) is int and 0 <= stride <= max(tensor.numel(), 1) for stride in strides)
        or not _is_dense(tensor.shape, strides)
    ):
        raise ArtifactError(f"the tensor {path!r} has strides that do not fit its shape")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
