"""The two kinds of files that weights come in, torch's zip archives and safetensors, told by content.

An archive may be a TorchScript program, as OpenAI's CLIP is: its tensors are read by the paths of their
attributes, and none of its code is.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pbe.checkpoints.pickles import Placeholder, Record, ScriptModule, StorageRef, read_pickle
from pbe.checkpoints.tensors import Lazies, LazyTensor, WeightFile
from pbe.errors import UserError

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
LOCAL_HEADER = 30  # bytes of a zip entry's header before its name
WRAPPERS = ("state_dict", "model_state_dict", "module", "model")
MAX_MODULES = 10_000  # of a program; a crafted one may hold itself
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class Weights:
    """The state dict of a file or of several shards, and what else lay beside it.

    ``extra`` names the other things in a checkpoint, ``extra_bytes`` is the size of their tensors
    (optimizer moments, mostly), none of which is read.
    """

    source: str
    tensors: Lazies
    extra: tuple[str, ...] = field(default=())
    extra_bytes: int = 0


def open_weights(path: Path) -> Weights:
    """Open a file of weights, whatever its name, without reading its numbers.

    Raises:
        UserError: no such file, not a file of weights, damaged, or a pickle that asks for more than tensors.
    """
    try:
        file = WeightFile(path)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    start = file.bytes_at(0, 64)
    if start.startswith(b"PK\x03\x04"):
        return _open_zip(file)
    if len(start) > 8 and start[8:9] == b"{":
        return Weights(str(path), _safetensors(file))
    raise UserError(f"{path}: {_what_it_is(start)}")


def _what_it_is(start: bytes) -> str:
    if not start:
        return "damaged: the file is empty; copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights themselves; fetch them with `git lfs pull`"
    if start.startswith(LEGACY_MAGIC):
        return "written by torch before 1.6; load it with torch and save it again"
    if start.lstrip().startswith((b"<", b"{")):
        return "text, not weights; was a web page downloaded in the file's place?"
    return "damaged, or neither a torch checkpoint nor a safetensors file; copy it again"


def _safetensors(file: WeightFile) -> Lazies:
    (length,) = struct.unpack("<Q", file.bytes_at(0, 8))
    damaged = f"{file.path}: damaged or not a safetensors file"
    if length > min(MAX_HEADER, file.size - 8):
        raise UserError(f"{damaged} (its header does not fit into it); copy it again")
    try:
        header = json.loads(file.bytes_at(8, length))
        header.pop("__metadata__", None)
        return {key: _entry(file, 8 + length, key, entry) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{damaged} ({error}); copy it again") from error


def _entry(file: WeightFile, base: int, key: str, entry: dict[str, Any]) -> LazyTensor:
    if entry["dtype"] not in SAFETENSORS_TYPES:
        raise UserError(f"{file.path}: tensor '{key}' has the type {entry['dtype']}, which is not supported")
    start, end = (int(value) for value in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    tensor = file.tensor(base + start, shape, SAFETENSORS_TYPES[entry["dtype"]])
    if min(shape, default=0) < 0 or start < 0 or end - start != tensor.nbytes or base + end > file.size:
        raise ValueError(f"tensor '{key}' does not lie inside the file")
    return tensor


class _ZipRecord(Record):
    """One storage of torch's archive."""

    def __init__(self, file: WeightFile, entry: zipfile.ZipInfo, reference: StorageRef) -> None:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{file.path}: packed again with compression; save it with torch")
        if reference.count * reference.dtype.itemsize > entry.file_size:
            raise UserError(f"{file.path}: damaged, record '{entry.filename}' is too short; copy it again")
        self._file, self._entry, self._reference = file, entry, reference

    def _start(self) -> int:
        header = self._file.bytes_at(self._entry.header_offset, LOCAL_HEADER)
        name, extra = struct.unpack("<HH", header[26:30])
        return self._entry.header_offset + LOCAL_HEADER + int(name) + int(extra)

    def tensor(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
        """Describe a tensor of this storage."""
        dtype = self._reference.dtype
        # from the tensor's first element to its last
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        count = 0 if 0 in shape else last + 1
        if min((offset, *shape, *stride)) < 0 or offset + count > self._reference.count:
            raise ValueError("a tensor reaches beyond its storage")

        def read() -> torch.Tensor:
            values = self._file.values(self._start() + offset * dtype.itemsize, count, dtype)
            return torch.as_strided(values, shape, stride)

        return LazyTensor(shape, dtype, read)


def is_program(path: Path) -> bool:
    """Whether a file is a TorchScript program, told by what an archive of torch then holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _open_zip(file: WeightFile) -> Weights:
    path = file.path
    try:
        archive = zipfile.ZipFile(path)
        tables = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(tables) != 1:
            raise UserError(f"{path}: a zip file, but not a checkpoint of torch")
        root = tables[0].removesuffix("data.pkl")
        entries = {entry.filename.removeprefix(root): entry for entry in archive.infolist()}
        if "byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path}: written on a big-endian machine, which is not supported")
        table = archive.read(tables[0])
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy it again") from error

    def locate(reference: StorageRef) -> Record:
        if f"data/{reference.key}" not in entries:
            raise UserError(f"{path}: damaged, record 'data/{reference.key}' is missing; copy it again")
        return _ZipRecord(file, entries[f"data/{reference.key}"], reference)

    return _state_dict(str(path), read_pickle(table, locate, str(path)))


def _state_dict(source: str, content: object) -> Weights:
    """Find the state dict in what a pickle holds: the content itself, or wrapped once or more."""
    extra: list[str] = []
    extra_bytes = 0
    while (inner := _wrapped(content)) is not None:
        assert isinstance(content, dict)
        others = {key: value for key, value in content.items() if value is not inner}
        extra += [str(key) for key in others]
        extra_bytes += sum(tensor.nbytes for tensor in _tensors_in(list(others.values())))
        content = inner
    if isinstance(content, ScriptModule):
        content = _attributes(content, source)
    if isinstance(content, Placeholder):
        raise UserError(f"{source}: no weights where they should be but an object of '{content.origin}'")
    if not isinstance(content, dict) or not any(isinstance(value, LazyTensor) for value in content.values()):
        raise UserError(f"{source}: a checkpoint of torch, but there is no state dict in it")
    strangers = [
        f"{key} ({_kind(value)})" for key, value in content.items() if not isinstance(value, LazyTensor)
    ]
    if strangers:
        listed = ", ".join(strangers[:3])
        raise UserError(f"{source}: in its state dict, {len(strangers)} entries are no tensors: {listed}")
    return Weights(source, {str(key): value for key, value in content.items()}, tuple(extra), extra_bytes)


def _attributes(program: ScriptModule, source: str) -> dict[str, LazyTensor]:
    """Return the tensors of a program and of all modules in it, by the paths of their attributes."""
    found: dict[str, LazyTensor] = {}
    waiting = [("", program)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return found
        prefix, module = waiting.pop()
        for name, value in module.attributes.items():
            if isinstance(value, LazyTensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, ScriptModule):
                waiting.append((f"{prefix}{name}.", value))
    raise UserError(f"{source}: damaged, a program of more than {MAX_MODULES:,} modules")


def _wrapped(content: object) -> object | None:
    if not isinstance(content, dict) or any(isinstance(value, LazyTensor) for value in content.values()):
        return None
    return next((content[name] for name in WRAPPERS if name in content), None)


def _kind(value: object) -> str:
    return value.origin if isinstance(value, Placeholder) else type(value).__name__


def _tensors_in(content: object, depth: int = 20) -> Iterator[LazyTensor]:
    """Find tensors in nested containers, to a depth, since a crafted pickle may hold itself."""
    if isinstance(content, LazyTensor):
        yield content
    elif depth and isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors_in(value, depth - 1)
