"""A restricted reader for pickles: tensors come through, nothing is imported and nothing is called.

A pickle is a program, and ``torch.load`` runs it. This reader knows the few names that tensors and plain
containers need. Every other name becomes a placeholder that swallows whatever the pickle does to it, since
checkpoints of Lightning carry callbacks and settings that nobody here wants. Names that only an attack needs
end the reading.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from pbe.checkpoints.tensors import LazyTensor
from pbe.errors import UserError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Types without a storage of their own are written as bytes, with their type beside them.
BARE_TYPES = (
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint32", "uint64",
)  # fmt: skip
BUILTINS = ("builtins", "__builtin__", "io", "_io")
HARMFUL_BUILTINS = (
    "eval", "exec", "execfile", "compile", "open", "open_code", "file", "FileIO", "input", "__import__",
    "breakpoint",
)  # fmt: skip
# `commands` is what pickles of old protocols call subprocess.
HARMFUL_MODULES = (
    "os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "ctypes", "pty",
    "commands", "multiprocessing", "webbrowser", "urllib", "requests", "asyncio",
    "signal", "pip", "pickle", "_pickle", "marshal",
)  # fmt: skip

# Where a storage's record starts and how many bytes it has, and the tensors in it.
Locate = Callable[["StorageRef"], "Record"]


@dataclass(frozen=True)
class StorageRef:
    """What a pickle says of a tensor's numbers: the record they are in, their type and their number."""

    key: str
    dtype: torch.dtype
    count: int


class Record:
    """Numbers of one storage; the reader of the archive gives one for every :class:`StorageRef`."""

    def tensor(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
        """Describe a tensor in the storage; ``offset`` and ``stride`` count elements."""
        raise NotImplementedError

    def typed(self, dtype: torch.dtype) -> Record:
        """Return the same bytes as numbers of another type."""
        raise NotImplementedError


class Placeholder:
    """Stands for an object of a class that this reader does not know; whatever is done to it does nothing."""

    origin = ""

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        """Make one, whatever it is given."""
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _ignore(self, *args: object, **kwargs: object) -> Placeholder:
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = update = _ignore


def placeholder(origin: str) -> type[Placeholder]:
    """Make the class that stands for the global ``origin``."""
    return type("Placeholder", (Placeholder,), {"origin": origin})


class ScriptModule(Placeholder):
    """Stands for a module of a TorchScript program; of all that is done to it, it keeps its attributes."""

    attributes: Mapping[object, object] = MappingProxyType({})

    def __setstate__(self, state: object) -> None:  # type: ignore[override]
        if isinstance(state, dict):
            self.attributes = state


def _rebuild(record: Any, offset: int, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a tensor of a storage; of a kind of storage that is not known here, what stands for it."""
    if isinstance(record, Placeholder):
        return record
    return (record if dtype is None else record.typed(dtype)).tensor(offset, tuple(size), tuple(stride))


def script_module(origin: str) -> type[ScriptModule]:
    """Make the class that stands for the program's class ``origin``."""
    return type("ScriptModule", (ScriptModule,), {"origin": origin})


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles tensors (as :class:`LazyTensor`) and plain containers; the rest becomes placeholders.

    Args:
        content: the pickle.
        locate: finds the record of a storage.
        source: named in errors.
    """

    def __init__(self, content: bytes, locate: Locate, source: str) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._locate = locate
        self._source = source
        # made anew for every file, so that no pickle can change what a later one meets
        self._known: dict[tuple[str, str], object] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): lambda size=(): tuple(size),
            ("torch._utils", "_rebuild_tensor_v2"): lambda record, offset, size, stride, *rest: _rebuild(
                record, offset, size, stride
            ),
            (
                "torch._utils",
                "_rebuild_tensor_v3",
            ): lambda record, offset, size, stride, grad, hooks, kind, *rest: _rebuild(
                record, offset, size, stride, kind
            ),
            ("torch.storage", "UntypedStorage"): torch.uint8,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *rest: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global; never an import."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in BARE_TYPES:
            return getattr(torch, name)
        if module.partition(".")[0] == "__torch__":  # where TorchScript puts a program's classes
            return script_module(f"{module}.{name}")
        harmful = module in BUILTINS and name in HARMFUL_BUILTINS
        if harmful or module.partition(".")[0] in HARMFUL_MODULES:
            raise UserError(
                f"{self._source}: refused, and nothing of it was run: it asks for '{module}.{name}', which "
                "weights never need; do not trust where it came from"
            )
        return placeholder(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> Any:
        """Return the record that a tensor's reference to its storage means."""
        kind, dtype, key, _, count = reference
        if kind == "storage" and isinstance(dtype, type) and issubclass(dtype, Placeholder):
            return dtype()  # complex or quantised numbers, which no weight here is made of
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"an unknown kind of storage ({kind!r})")
        return self._locate(StorageRef(str(key), dtype, int(count)))


def read_pickle(content: bytes, locate: Locate, source: str) -> Any:
    """Read a pickle of tensors and plain containers.

    Args:
        content: the pickle.
        locate: finds the record of a storage.
        source: named in errors.
    """
    try:
        return RestrictedUnpickler(content, locate, source).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything at all
        raise UserError(
            f"{source}: damaged, its table of tensors cannot be read ({type(error).__name__}: {error})"
        ) from error
