"""Weights to files, one tensor after the other, so that no more than one is in memory at a time."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbe.checkpoints.pickles import STORAGES, StorageRef
from pbe.checkpoints.readers import SAFETENSORS_TYPES
from pbe.checkpoints.tensors import Lazies, LazyTensor
from pbe.files import atomic_file

ALIGNMENT = 64  # bytes; where torch starts the records of an archive
NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


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
        archive.writestr(_entry("data.pkl"), table.getvalue())
        archive.writestr(_entry("byteorder"), b"little")
        for index, tensor in enumerate(tensors.values()):
            entry = _entry(f"data/{index}", tensor.nbytes, at=file.tell())
            with archive.open(entry, "w") as record:
                record.write(_raw(tensor.read()))
        archive.writestr(_entry("version"), b"3\n")


def _entry(name: str, size: int = 0, at: int | None = None) -> zipfile.ZipInfo:
    """Describe a record; ``at`` is where it begins, to have its numbers start at a multiple of 64."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = size
    if at is not None:
        zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0
        start = at + 30 + len(entry.filename) + zip64 + 4
        padding = -start % ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return entry
