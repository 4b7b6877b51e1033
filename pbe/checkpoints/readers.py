"""The two kinds of files that weights come in, torch's zip archives and safetensors, told by content.

An archive may be a TorchScript program, as OpenAI's CLIP is: its tensors are read by the paths of their
attributes, and none of its code is.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pbe.checkpoints.pickles import Placeholder, Record, ScriptModule, StorageRef, read_pickle
from pbe.checkpoints.tensors import Lazies, LazyTensor, WeightFile, widened
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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
LOCAL_HEADER, LOCAL_MAGIC = 30, b"PK\x03\x04"  # bytes of a zip entry's header before its name, and the first
# What zipfile raises for damaged archives: a name that is no text, a packing that is not known, and so on.
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError)
SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input")
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Under which names a state dict lies in a checkpoint; the first that is there is taken.
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "module", "model", "params", "net", "network", "weights",
    "student", "pipe", "pipeline",
)  # fmt: skip
# A name that speaks of averaged weights (those of a teacher are its student's average).
AVERAGE = re.compile(r"(?:^|[_.])(?:ema|average|averaged|avg|shadow|swa|teacher)(?:[_.]|$)", re.IGNORECASE)
LIGHTNING_PLAIN = "current_model_state"  # where Lightning's averaging puts the plain weights
NOT_WEIGHTS = ("optimizer", "optimizer_states", "optimizer_state_dict", "lr_schedulers", "loops", "callbacks")
MAX_MODULES = 10_000  # of a program; a crafted one may hold itself
MAX_DEPTH = 20  # of containers in one another, likewise


@dataclass(frozen=True)
class Weights:
    """The state dict of a file or of several shards, and what else lay beside it.

    Attributes:
        source: the file, for errors.
        tensors: the state dict; empty where there is an average only.
        extra: names of the other things in a checkpoint.
        extra_bytes: size of their tensors (optimizer moments, mostly), none of which is read.
        average: the averaged weights that lie beside the state dict, under names of their own.
        config: the configuration that a training checkpoint of this project carries.
        notes: one line for each thing that was done to the numbers.
    """

    source: str
    tensors: Lazies
    extra: tuple[str, ...] = field(default=())
    extra_bytes: int = 0
    average: Lazies = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def open_weights(path: Path) -> Weights:
    """Open a file of weights, whatever its name, without reading its numbers."""
    try:
        file = WeightFile(path)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    start = file.bytes_at(0, 64)
    if start.startswith(LOCAL_MAGIC):
        return _lifted(_open_zip(file))
    if len(start) > 8 and start[8:9] == b"{":
        return _lifted(Weights(str(path), _safetensors(file)))
    raise UserError(f"{path}: {_what_it_is(start)}")


def _lifted(weights: Weights) -> Weights:
    """Bring 8-bit floats to float16, without loss; refuse them where scales of their own belong to them."""
    tables = weights.tensors, weights.average
    eighths = [key for table in tables for key, value in table.items() if widened(value) is not value]
    scales = [key for table in tables for key in table if key.endswith(SCALES)]
    if eighths and scales:
        raise UserError(
            f"{weights.source}: fp8 weights with scales beside them ('{scales[0]}'), which are not "
            "supported; take the fp16 file"
        )
    if not eighths:
        return weights
    tensors, average = ({key: widened(value) for key, value in table.items()} for table in tables)
    notes = (f"{len(eighths)} tensors in fp8: read as fp16, with the precision that fp8 left",)
    return replace(weights, tensors=tensors, average=average, notes=notes)


def _what_it_is(start: bytes) -> str:
    if not start:
        return "damaged: the file is empty; copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights themselves; fetch them with `git lfs pull`"
    if start.startswith(b"GGUF"):
        return "a GGUF file of quantised weights, which is not supported; take the fp16 file"
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
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
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

    def typed(self, dtype: torch.dtype) -> _ZipRecord:
        """Return the same bytes as numbers of another type."""
        size = self._reference.count * self._reference.dtype.itemsize
        return _ZipRecord(
            self._file, self._entry, StorageRef(self._reference.key, dtype, size // dtype.itemsize)
        )

    def _start(self) -> int:
        header = self._file.bytes_at(self._entry.header_offset, LOCAL_HEADER)
        whole = len(header) == LOCAL_HEADER and header.startswith(LOCAL_MAGIC)
        name, extra = struct.unpack("<HH", header[26:30]) if whole else (0, 0)
        start = self._entry.header_offset + LOCAL_HEADER + int(name) + int(extra)
        if not whole or start + self._entry.file_size > self._file.size:
            raise UserError(
                f"{self._file.path}: damaged, record '{self._entry.filename}' is not where it should be; "
                "copy it again"
            )
        return start

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
    except BROKEN_ZIP:
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
    except BROKEN_ZIP as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy it again") from error

    def locate(reference: StorageRef) -> Record:
        if f"data/{reference.key}" not in entries:
            raise UserError(f"{path}: damaged, record 'data/{reference.key}' is missing; copy it again")
        return _ZipRecord(file, entries[f"data/{reference.key}"], reference)

    return state_of(read_pickle(table, locate, str(path)), str(path))


def state_of(content: object, source: str) -> Weights:
    """Find the state dict in what a pickle holds: the content itself, or wrapped once or more."""
    config = _config(content)
    extra: list[str] = []
    extra_bytes = 0
    average: Lazies = {}
    for _ in range(MAX_DEPTH):
        average = average or _average(content)
        inner = _wrapped(content)
        if inner is None:
            break
        assert isinstance(content, dict)
        others = {key: value for key, value in content.items() if value is not inner}
        extra += [str(key) for key in others]
        extra_bytes += sum(tensor.nbytes for tensor in _tensors_in(list(others.values())))
        content = inner
    if isinstance(content, ScriptModule):
        content = _attributes(content, source)
    if isinstance(content, Placeholder):
        raise UserError(
            f"{source}: no weights where they should be but an object of '{content.origin}'; "
            "save its state_dict() instead"
        )
    state = _tensors(content)
    if not state and not average:
        raise UserError(f"{source}: a checkpoint of torch, but there is no state dict in it")
    if state and isinstance(content, dict):
        extra += [str(key) for key, value in content.items() if not isinstance(value, LazyTensor)]
    return Weights(source, state, tuple(extra), extra_bytes, average, config)


def _tensors(content: object) -> Lazies:
    """Return the tensors that lie in a container by name."""
    if not isinstance(content, dict):
        return {}
    return {str(key): value for key, value in content.items() if isinstance(value, LazyTensor)}


def _wrapped(content: object) -> object | None:
    """Return what the container wraps: by a known name, or the only one in it that holds tensors."""
    if not isinstance(content, dict) or _tensors(content):
        return None
    if LIGHTNING_PLAIN in content and isinstance(content.get("state_dict"), dict):
        return content[LIGHTNING_PLAIN]
    for name in WRAPPERS:
        if name in content:
            return content[name]
    holders = [
        value
        for key, value in content.items()
        if isinstance(value, dict)
        and str(key) not in NOT_WEIGHTS
        and not AVERAGE.search(str(key))
        and _dict_of_tensors(value)
    ]
    return holders[0] if len(holders) == 1 else None


def _dict_of_tensors(content: object, depth: int = 4) -> Lazies:
    """Return the first tensors by name in a container or those it wraps."""
    if not isinstance(content, dict) or not depth:
        return {}
    if found := _tensors(content):
        return found
    for value in content.values():
        if found := _dict_of_tensors(value, depth - 1):
            return found
    return {}


def _average(content: object) -> Lazies:
    """Return the averaged weights that lie in a container beside the state dict."""
    if not isinstance(content, dict):
        return {}
    if LIGHTNING_PLAIN in content:
        return _dict_of_tensors(content.get("state_dict"))
    callbacks = content.get("callbacks")
    states = [*callbacks.values()] if isinstance(callbacks, dict) else []
    for place in (content, *states):
        for key, value in place.items() if isinstance(place, dict) else ():
            if AVERAGE.search(str(key)) and (found := _dict_of_tensors(value)):
                return found
    return {}


def _config(content: object) -> dict[str, Any] | None:
    """Return the configuration of a training checkpoint of this project."""
    config = content.get("config") if isinstance(content, dict) else None
    return config if isinstance(config, dict) and isinstance(config.get("model"), dict) else None


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


def _tensors_in(content: object, depth: int = MAX_DEPTH) -> Iterator[LazyTensor]:
    """Find tensors in nested containers, to a depth, since a crafted pickle may hold itself."""
    if isinstance(content, LazyTensor):
        yield content
    elif depth and isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors_in(value, depth - 1)
