"""Where in a pickle's content the weights are: the state dict, its average, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pbe.checkpoints.pickles import Placeholder, ScriptModule
from pbe.checkpoints.tensors import Lazies, LazyTensor
from pbe.errors import UserError

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
