"""Files of weights, torch's zip archives and safetensors: read lazily, and written.

Files are told by content. An archive may be a TorchScript program, as OpenAI's CLIP is: its tensors are read
by the paths of their attributes, and none of its code is. No more than one tensor is in memory at a time.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbe.checkpoints.pickles import STORAGES, Record, StorageRef, read_pickle
from pbe.checkpoints.recognise import Weights, state_of
from pbe.checkpoints.tensors import Lazies, LazyTensor, WeightFile, widened
from pbe.errors import UserError
from pbe.files import atomic_file

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
ALIGNMENT = 64  # bytes; where torch starts the records of an archive
NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


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
        own = self._reference
        count = own.count * own.dtype.itemsize // dtype.itemsize
        return _ZipRecord(self._file, self._entry, StorageRef(own.key, dtype, count))

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


def _raw(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def write_safetensors(path: Path, tensors: Lazies, metadata: dict[str, str]) -> None:
    """Write a safetensors file, with texts for its header.

    The library's own writer wants all tensors in memory at once.
    """
    # the widest types first keeps every tensor aligned
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, str(tensors[key].dtype), key))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key in order:
        end = offset + tensors[key].nbytes
        header[key] = {
            "dtype": NAMES[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, sync=True) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            file.write(_raw(tensors[key].read()))


class _Tensor:
    """Pickles as torch's own tensors do."""

    def __init__(self, key: str, tensor: LazyTensor) -> None:
        self.storage, self.shape = StorageRef(key, tensor.dtype, tensor.count), tensor.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, StorageRef):
            return None
        return "storage", getattr(torch, STORAGE_NAMES[obj.dtype]), obj.key, "cpu", obj.count


def write_checkpoint(path: Path, tensors: Lazies, rest: dict[str, Any]) -> None:
    """Write a checkpoint that ``torch.load`` reads: ``{"state_dict": ..., **rest}`` with plain ``rest``."""
    state = {key: _Tensor(str(index), tensor) for index, (key, tensor) in enumerate(tensors.items())}
    table = io.BytesIO()
    _Pickler(table, protocol=2).dump({"state_dict": state, **rest})
    with (
        atomic_file(path, sync=True) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        archive.writestr(_zip_entry("data.pkl"), table.getvalue())
        archive.writestr(_zip_entry("byteorder"), b"little")
        for index, tensor in enumerate(tensors.values()):
            entry = _zip_entry(f"data/{index}", tensor.nbytes, at=file.tell())
            with archive.open(entry, "w") as record:
                record.write(_raw(tensor.read()))
        archive.writestr(_zip_entry("version"), b"3\n")


def _zip_entry(name: str, size: int = 0, at: int | None = None) -> zipfile.ZipInfo:
    """Describe a record; ``at`` is where it begins, to have its numbers start at a multiple of 64."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = size
    if at is not None:
        zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0
        start = at + 30 + len(entry.filename) + zip64 + 4
        padding = -start % ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return entry
