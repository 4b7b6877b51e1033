"""State dicts: found in a checkpoint, wrappers taken off, averages found, the layout recognised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
# What DDP, FSDP, DeepSpeed, torch.compile and activation checkpointing put between the levels of a name.
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
# Where the names of a layout begin; what stands in front is the name of whatever holds the model.
ANCHOR = re.compile(
    r"(?:^|(?<=\.))(?:(?:model\.)?diffusion_model\.|model_ema\.|first_stage_model\.|cond_stage_model\."
    r"|(?:unet|autoencoder|exemplar_encoder)\.)"
)
# Two names of the original that stand outside its networks; every attention has a proj_out too.
LOOSE = re.compile(
    r"^(?!.*(?:attn|attention|block))(?:[^\W\d]\w*\.)*?(?=(?:learnable_vector|proj_out\.(?:weight|bias))$)"
)
UNET = ("model.diffusion_model.", "unet.")
# Networks and halves of them, each averaged as a whole or not at all; the first that fits is meant.
UNITS = (
    "model.diffusion_model.", "unet.", "first_stage_model.", "autoencoder.encoder.",
    "autoencoder.quant_conv.", "autoencoder.patch_encoder.", "autoencoder.",
    "cond_stage_model.transformer.", "cond_stage_model.", "exemplar_encoder.tower.", "exemplar_encoder.",
)  # fmt: skip
# What has no average: weights that the method leaves frozen with one token, and counters.
FROZEN = re.compile(r"\.attn2\.to_[qk]\.|\.block\.norm2\.|\.num_batches_tracked$|\.running_\w+$")
ADVICE = "--raw-weights (raw_weights=True) takes the plain ones"
COUNTERS = {"decay", "num_updates", "n_averaged", "initted", "step"}  # of an average itself

NATIVE = "native"
COMPVIS = "compvis"

# The first convolution in each layout.
INPUTS = ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight", "unet.conv_in.weight")

# A prefix that gives a kind of file away, and what to say of it; the first that fits is taken.
SIGNS = (
    ("conditioner.embedders.", "a Stable Diffusion XL checkpoint, which has no exemplar encoder"),
    ("cond_stage_model.model.transformer.", "a Stable Diffusion 2 checkpoint, which has no exemplar encoder"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 checkpoint, which has no exemplar encoder"),
    ("control_model.", "a ControlNet, not a whole model"),
    ("lora_", "a LoRA, not a whole model"),
    ("text_model.", "a text encoder alone, not a whole model"),
    ("encoder.down_blocks.", "the autoencoder alone of a folder in diffusers' layout; give the whole folder"),
    ("encoder.down.", "an autoencoder alone in the original's layout, not a whole model"),
    ("encoder.levels.", "the autoencoder alone of a native folder; give the whole folder"),
    ("mapper.blocks.", "the image encoder alone of a folder in diffusers' layout; give the whole folder"),
    ("tower.", "the exemplar encoder alone of a native folder; give the whole folder"),
    ("vision_model.", "an image tower alone, not a whole model"),
    ("visual.", "a CLIP model, not a whole model"),
    ("down_blocks.", "the UNet alone of a folder in diffusers' layout; give the whole folder"),
    ("input_blocks.", "a UNet alone in the original's layout, not a whole model"),
    ("down.", "the UNet alone of a native folder; give the whole folder"),
)
# Of the networks' names; two of them make most of a model.
WHOLE = {
    COMPVIS: ("first_stage_model.", "cond_stage_model."),
    NATIVE: ("unet.", "autoencoder.", "exemplar_encoder."),
}
TEXT = "cond_stage_model.transformer.text_model."


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


@dataclass(frozen=True)
class Sorted:
    """A state dict by what its names say.

    Attributes:
        plain: the tensors of the model under the names of a layout.
        average: averaged ones, under names of a layout or under such names without their dots.
        strangers: the rest, under the names of the file without wrappers.
    """

    plain: Lazies
    average: Lazies
    strangers: Lazies


def sort_out(weights: Weights) -> Sorted:
    """Take off what wraps the names of a state dict, at any depth, and tell its averages by their names."""
    plain: Lazies = {}
    average: Lazies = {}
    strangers: Lazies = {}
    origin: dict[str, str] = {}
    for table, averaged in ((weights.tensors, False), (weights.average, True)):
        for key, tensor in table.items():
            prefix, name = split(key)
            if averaged or (prefix is not None and (AVERAGE.search(prefix) or name.startswith("model_ema."))):
                name = name.removeprefix("model_ema.")
                if name not in COUNTERS:
                    average[name] = tensor
            elif prefix is None:
                strangers[name] = tensor
            elif name in plain:
                raise UserError(
                    f"{weights.source}: the model is in it more than once ('{origin[name]}' and '{key}'); "
                    "keep one of the two"
                )
            else:
                plain[name], origin[name] = tensor, key
    return Sorted(plain, average, strangers)


def split(key: str) -> tuple[str | None, str]:
    """Return what stands in front of a layout's name, None where there is no such name, and the name."""
    bare = ".".join(level for level in key.split(".") if level not in WRAPPED)
    if match := ANCHOR.search(bare):
        start = match.start()
    elif match := LOOSE.match(bare):
        start = match.end()
    else:
        return None, bare
    name = bare[start:]
    return bare[:start], f"model.{name}" if name.startswith("diffusion_model.") else name


def left_out(strangers: Lazies) -> list[str]:
    """Return what to say of tensors that belong to no network of the model."""
    if not strangers:
        return []
    listed = ", ".join(sorted(strangers)[:3])
    more = ", ..." if len(strangers) > 3 else ""
    return [f"{len(strangers)} tensors of no network of the model left out ({listed}{more})"]


def choose(
    found: Sorted, expected: Iterable[str], source: str, *, raw_weights: bool
) -> tuple[Lazies, list[str]]:
    """Return the weights to use, the averaged ones where there are any, and what to say of it."""
    expected = list(expected)
    if not found.average:
        return found.plain, ["no average in it: its only weights are taken"] if raw_weights else []
    averages = {key: name for key in expected for name in _names(key) if name in found.average}
    if raw_weights:
        if not any(key in found.plain for key in averages):
            raise UserError(f"{source}: it holds averaged weights only; leave out --raw-weights")
        return found.plain, ["plain weights taken; its averaged (EMA) ones are left out"]
    _check_whole(averages.keys(), expected, source)
    taken = {key: found.average[name] for key, name in averages.items()}
    advice = ADVICE if any(key in found.plain for key in taken) else "it holds no plain ones"
    return found.plain | taken, [f"averaged (EMA) weights taken, {len(taken)} tensors; {advice}"]


def _names(key: str) -> Iterator[str]:
    """Give the names that an average may have for a weight, the usual ones last."""
    for prefix in UNET:
        if key.startswith(prefix):
            yield key.removeprefix(prefix)
    for name in (key.removeprefix("model."), key):
        yield name.replace(".", "")
        yield name


def _check_whole(averaged: Iterable[str], expected: list[str], source: str) -> None:
    """Refuse an average that fits no weight, or only a part of those that are averaged together."""
    averaged = set(averaged)
    if not averaged:
        raise UserError(f"{source}: its averaged (EMA) weights fit none of the model's; {ADVICE}")
    begun = {_unit(key) for key in averaged}
    lost = [key for key in expected if key not in averaged and _unit(key) in begun and not FROZEN.search(key)]
    if lost:
        raise UserError(
            f"{source}: its averaged (EMA) weights are incomplete: {len(lost)} of "
            f"{len(averaged) + len(lost)} are missing, such as '{lost[0]}'; {ADVICE}"
        )


def _unit(key: str) -> str:
    return next((unit for unit in UNITS if key.startswith(unit)), key)


def layout_of(found: Sorted) -> str | None:
    """Return ``compvis`` or ``native`` for the state dict of a whole model, or of most of it; else None."""
    names = [*found.plain, *found.average]
    if any(key.startswith(("model.diffusion_model.", "diffusion_model")) for key in names):
        return COMPVIS
    for layout, prefixes in WHOLE.items():
        if sum(any(key.startswith(prefix) for key in names) for prefix in prefixes) > 1:
            return layout
    return None


def describe(tensors: Lazies) -> str:
    """Return a sentence on what the file looks like and, where that helps, what to do."""
    if any(key.startswith(TEXT) for key in tensors):
        return text_to_image(kernel[1] if (kernel := _first_kernel(tensors)) else None)
    if any(".lora" in key for key in tensors):
        return "It looks like a LoRA, not a whole model."
    for prefix, what in SIGNS:
        if any(key.startswith(prefix) for key in tensors):
            return f"It looks like {what}."
    layout = layout_of(Sorted(tensors, {}, {}))
    if layout == COMPVIS and not any(key.startswith("cond_stage_model.") for key in tensors):
        return f"It looks like the original's layout without an exemplar encoder ({_channels(tensors)})."
    if layout is not None:
        named = "the original's" if layout == COMPVIS else "the native"
        return f"It looks like {named} layout ({_channels(tensors)}); is the configuration the right one?"
    return "It looks like none of the layouts known here (native, the original's, diffusers')."


def text_to_image(inputs: int | None) -> str:
    """Return what to say of a Stable Diffusion model with a text encoder and so many input channels."""
    if inputs == 9:
        return (
            "It looks like a Stable Diffusion inpainting model, which has a text encoder; its 9 input "
            "channels are in another order (latents, mask, masked image; here latents, masked image, mask), "
            "so it cannot be used."
        )
    return (
        "It looks like a Stable Diffusion text-to-image model, which has a text encoder and no exemplar "
        "encoder; pbe convert --from-sd makes the start of a training from it."
    )


def _first_kernel(tensors: Lazies) -> tuple[int, ...] | None:
    """Return the shape of the UNet's first convolution, in whatever layout."""
    kernels = (tensors[key].shape for key in INPUTS if key in tensors)
    return next((shape for shape in kernels if len(shape) == 4), None)


def _channels(tensors: Lazies) -> str:
    first = _first_kernel(tensors)
    return "no input convolution" if first is None else f"{first[0]} channels wide, {first[1]} input channels"
