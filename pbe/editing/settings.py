"""Settings of an edit and of the command that edits; conventions of preparing inputs. No torch here.

Annotations are evaluated (no ``from __future__``): a command line reads them in a class of another module.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pbe.errors import EditTypeError, EditValueError
from pbe.files import expand_home
from pbe.resources import find_model

SolverName = Literal[
    "plms", "pndm", "ddim", "dpmpp_2m", "dpmpp_sde", "unipc", "euler", "euler_ancestral", "heun", "lms", "lcm"
]
SpacingName = Literal["uniform", "leading", "linspace", "trailing"]
ConventionsName = Literal["original", "diffusers"]
Region = Literal["full", "mask"]
Dtype = Literal["fp32", "bf16", "fp16"]
PresetName = Literal["draft", "normal", "best"]

DEFAULT_STEPS = 50
# What docs/solvers.md recommends, by measurement: fewest calls, near the converged edit, practically there.
PRESETS: dict[PresetName, dict[str, Any]] = {
    "draft": {"solver": "dpmpp_2m", "spacing": "trailing", "steps": 8},
    "normal": {"solver": "dpmpp_2m", "karras": True, "steps": 18},
    "best": {"solver": "unipc", "karras": True, "steps": 40},
}

MAX_COUNT = 2**31 - 1  # libraries below this one overflow beyond it
MAX_SEED = 2**63 - 1
MAX_SIDE = 65535  # of sizes, margins and feathers in pixels; more is a slip of the keyboard
MAX_IMAGES = 1_000_000  # of one image; each has a file name that is checked beforehand
# The ranges of all settings: whole numbers from 1 to a largest, numbers from 0 to a largest.
COUNTS = {
    "steps": MAX_COUNT,
    "num_images": MAX_IMAGES,
    "height": MAX_SIDE,
    "width": MAX_SIDE,
    "batch_size": MAX_COUNT,
    "attention_slicing": MAX_COUNT,
    "reuse_features": MAX_COUNT,
}
NUMBERS = {"guidance_scale": math.inf, "eta": 1.0, "margin": MAX_SIDE, "feather": MAX_SIDE}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CALL_NAMES = {"steps": "num_inference_steps", "num_images": "num_images_per_prompt"}  # as in diffusers


def option_name(field: str) -> str:
    """Return the option of a command line that sets a field of :class:`EditCommand`."""
    return f"--{field.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How images are edited: the same for the pipeline's call, the command line and the records.

    A ``group`` in a field's metadata is the heading of help for the fields from there on.
    """

    preset: PresetName | None = field(default=None, metadata={"group": "Sampling"})
    """solver, spacing and steps in one word; options given beside it win"""
    solver: SolverName | None = None
    """how noise is turned into an image (default: the model's, else plms)"""
    spacing: SpacingName | None = None
    """spacing of the timesteps (default: the solver's)"""
    karras: bool = False
    """use the noise levels of Karras et al."""
    steps: int | None = None
    """steps of the solver (default: 50, the preset's, or what a few-step model is meant for)"""
    guidance_scale: float = 5.0
    """how strongly the exemplar is followed; 1 turns guidance off"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """noise levels that are guided, 0 is clean and 1 is noise; other steps take half the time"""
    reuse_features: int = 1
    """this many network calls share the UNet's inner levels: faster, but approximate above 1"""
    eta: float = 0.0
    """share of fresh noise in every step, 0 to 1; ddim and lcm only"""
    seed: int = 0
    """seed of the noise; edit k of an image has seed + k"""
    num_images: int = 1
    """edits of each image"""
    conventions: ConventionsName | None = None
    """prepare the inputs as the original code or as diffusers does (default: the model's)"""
    region: Region = field(default="full", metadata={"group": "Region and size"})
    """edit the whole image, or only the mask's surroundings, at the model's size"""
    margin: float = 0.5
    """with --region mask: room around the mask, as a share of its longer side"""
    feather: float | None = None
    """with --region mask: width of the seam in pixels (default: by size)"""
    height: int | None = None
    """height of the result; with --region mask, of what the model sees"""
    width: int | None = None
    """width of the same"""
    preserve_background: bool = True
    """keep every pixel outside the mask exactly"""

    def checked(self, named: Callable[[str], str] = lambda name: CALL_NAMES.get(name, name)) -> Self:
        """Return the settings with every value checked, as Python's numbers; errors use ``named``."""
        values = vars(self)
        found: dict[str, Any] = {}
        found["guidance_interval"] = check_interval(named("guidance_interval"), self.guidance_interval)
        if not 0 <= self.seed <= MAX_SEED:
            raise EditValueError(f"{named('seed')} is {self.seed}; it must lie between 0 and {MAX_SEED}")
        optional = ("steps", "height", "width", "feather", "attention_slicing")
        for name in (each for each in values if not (each in optional and values[each] is None)):
            if name in COUNTS:
                found[name] = check_count(named(name), values[name], COUNTS[name])
            elif name in NUMBERS:
                found[name] = check_number(named(name), values[name], NUMBERS[name])
        kind = type(self.preserve_background).__name__
        if kind not in ("bool", "bool_"):  # Python's or numpy's, which is not imported here
            raise EditTypeError(f"{named('preserve_background')}: {kind}; it must be True or False")
        if self.region not in get_args(Region):
            raise EditValueError(f"no region '{self.region}'; there are: {', '.join(get_args(Region))}")
        checked = replace(self, **found).with_preset(named)
        if checked.eta and checked.solver not in (None, "ddim", "lcm"):
            raise EditValueError(
                f"{named('eta')} above 0 is for {named('solver')} ddim and lcm, not {checked.solver}"
            )
        return checked

    @property
    def count(self) -> int:
        """Steps of the solver."""
        return DEFAULT_STEPS if self.steps is None else self.steps

    def with_preset(self, named: Callable[[str], str]) -> Self:
        """Return the settings with what the preset stands for, where nothing else is asked for."""
        if self.preset is None:
            return self
        if self.preset not in tuple(PRESETS):
            raise EditValueError(f"no {named('preset')} '{self.preset}'; there are: {', '.join(PRESETS)}")
        preset = dict(PRESETS[self.preset])
        if self.solver is not None:  # its own spacing, which may have no Karras levels
            preset = {"steps": preset["steps"]}
        if self.karras or self.spacing is not None:
            preset = {name: preset[name] for name in preset if name not in ("karras", "spacing")}
        if self.steps is not None:
            preset.pop("steps")
        return replace(self, preset=None, **preset)


@dataclass(frozen=True, kw_only=True)
class EditCommand(EditSettings):
    """Everything that the command which edits takes; in paths a leading ``~`` is the home folder."""

    model: str = field(metadata={"group": "Model"})
    """folder, checkpoint, owner/name on the Hub, toy or toy-fast (the models that ship)"""
    config: str | None = None
    """YAML with the sizes of a checkpoint that does not give its own"""
    raw_weights: bool = False
    """use the plain weights of a training checkpoint, not their moving average"""
    adapter: tuple[str, ...] = ()
    """adapters to use with the model, FILE or FILE:SCALE each"""
    revision: str | None = None
    """branch, tag or commit of a model on the Hub (default: main)"""
    cache_dir: str | None = None
    """folder where models of the Hub are kept"""
    offline: bool = False
    """take models from that cache only"""
    safety_checker: str = "auto"
    """folder or owner/name; auto takes the model's own, none turns it off"""
    image: str | None = field(default=None, metadata={"group": "Input"})
    """image to edit"""
    mask: str | None = None
    """mask: white is repainted, black is kept; resized to the image"""
    exemplar: str | None = None
    """image of the object to paint"""
    name: str | None = None
    """name of the output files, without seed and ending (default: the image's)"""
    pairs: str | None = None
    """file of many edits: JSON lines, a JSON array or CSV"""
    out: str | None = field(default=None, metadata={"group": "Output"})
    """folder for the edits"""
    output: str | None = None
    """instead of --out: file for a single edit; its JSON goes beside it"""
    watermark: bool = False
    """put an invisible watermark into the edits"""
    device: str = field(default="auto", metadata={"group": "Running"})
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "fp32"
    """type of the weights; bf16 halves the memory"""
    int8: bool = False
    """keep the weights in 8 bits and compute in --dtype: least memory, slightly different results"""
    compile: bool = False
    """compile the UNet, for faster steps on a GPU: takes minutes once, and is kept for later starts"""
    batch_size: int = 4
    """edits that run at once; fewer need less memory"""
    cpu_offload: bool = False
    """keep idle networks off the accelerator"""
    attention_slicing: int | None = None
    """compute attention for this many queries at a time, to save memory"""
    quiet: bool = False
    """no progress bars"""

    def __post_init__(self) -> None:
        paths = ("model", "config", "cache_dir", "safety_checker", "image", "mask", "exemplar", "pairs")
        for name in (*paths, "out", "output"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, expand_home(getattr(self, name)))

    def checked(self, named: Callable[[str], str] = option_name) -> Self:
        """Return the command with every value checked, and that its models may exist."""
        found = super().checked(named)
        if self.compile and self.reuse_features > 1:
            raise EditValueError(
                f"{named('compile')} and {named('reuse_features')} cannot go together; leave one out"
            )
        existing_path(self.model, named("model"))
        for text in self.adapter:
            place, _ = parse_adapter(text, named("adapter"))
            if not os.path.exists(place):
                raise EditValueError(
                    f"{named('adapter')} '{place}' does not exist; give an adapter's file or run"
                )
        for name in ("image", "mask", "exemplar", "pairs"):
            if (given := getattr(self, name)) and "://" in given and not os.path.exists(given):
                raise EditValueError(f"{named(name)} is the URL '{given}'; download it and give the file")
        if self.safety_checker not in ("auto", "none"):
            existing_path(self.safety_checker, named("safety_checker"))
        return found


def existing_path(path_or_hub_id: str | Path, option: str = "") -> Path | None:
    """Return a path that exists, or the model that ships; None for what may be ``owner/name`` on the Hub.

    A path that exists comes first; a leading ``~`` is the home folder. ``option`` is that of a command line.
    """
    name = find_model(expand_home(str(path_or_hub_id)))
    if os.path.exists(name):  # of a Path, exists() raises for names that no system can have
        return Path(name)
    if isinstance(path_or_hub_id, Path) or not HUB_ID.fullmatch(name):
        kinds = "a model's folder, a checkpoint file or a Hub id (owner/name)"
        raise EditValueError(f"{option and option + ' '}'{name}' does not exist; give {kinds}")
    return None


def parse_adapter(text: str, option: str = "adapter") -> tuple[Path, float]:
    """Read ``FILE`` or ``FILE:SCALE``, an adapter and the factor on it (1 where none is given).

    A file that is called so as a whole comes first; the scale may be any finite number.
    """
    place, colon, number = text.rpartition(":")
    whole = Path(expand_home(text))
    if not colon or os.path.exists(whole):
        return whole, 1.0
    try:
        scale = float(number)
    except ValueError:
        return whole, 1.0
    if not math.isfinite(scale):
        raise EditValueError(f"{option} is '{text}'; its scale must be a finite number")
    return Path(expand_home(place)), scale


def check_count(
    name: str,
    value: object,
    largest: int = MAX_COUNT,
    kind: type[EditTypeError | EditValueError] = EditTypeError,
) -> int:
    """Return a setting that is a whole number from 1 to ``largest``, of whatever numeric type, as an int.

    ``kind`` is the error for anything that is no whole number, ``name`` what errors call the setting.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise kind(f"{name}: {type(value).__name__}; it must be an int")
    number = int(value) if isinstance(value, Integral) else _float(name, value)
    if number < 1 or not math.isfinite(number):
        raise EditValueError(f"{name} is {value}; it must be at least 1")
    if number > largest:
        raise EditValueError(f"{name} is {value}; it must be at most {largest}")
    if number != int(number):
        raise kind(f"{name} is {value}; it must be a whole number")
    return int(number)


def check_number(name: str, value: object, largest: float = math.inf) -> float:
    """Return a setting that is a finite number from 0 up, of whatever numeric type, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise EditTypeError(f"{name}: {type(value).__name__}; it must be a number")
    number = _float(name, value)
    if not (math.isfinite(number) and 0.0 <= number <= largest):
        wanted = "be a number from 0 up" if largest == math.inf else f"lie between 0 and {largest:g}"
        raise EditValueError(f"{name} is {value}; it must {wanted}")
    return number


def check_interval(name: str, value: object) -> tuple[float, float]:
    """Return two shares of the noise schedule, the lower first."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise EditTypeError(f"{name} is {value!r}; it must be two numbers from 0 to 1, the lower first")
    low, high = (check_number(name, each, 1.0) for each in value)
    if low > high:
        raise EditValueError(f"{name} is {low:g} to {high:g}; the lower number comes first")
    return low, high


def _float(name: str, value: Real) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise EditValueError(f"{name} is too large a number") from error


@dataclass(frozen=True)
class Conventions:
    """Where the original's inference, which has the defaults, and diffusers' pipeline differ."""

    name: str = "original"
    crop_exemplar: bool = False
    """the exemplar goes through CLIP's processor (shortest edge, centre crop), not squashed whole"""
    mask_mode: str = "bilinear"
    """interpolation of the keep mask to latent size, never antialiased"""
    half_is_masked: bool = True
    """a mask value of exactly one half is repainted"""
    share_posterior: bool = False
    """the masked image's posterior is drawn once an image, not once an edit"""
    guidance_floor: float = 0.0
    """guidance scales below count as this"""
    leading: frozenset[str] = frozenset()
    """solvers that take timesteps in ``leading`` spacing where none is asked for"""
    largest_side: int = 0
    """images up to its square in pixels keep their size, whatever size the model was trained at"""


DIFFUSERS = Conventions(
    name="diffusers",
    crop_exemplar=True,
    mask_mode="nearest",
    half_is_masked=False,
    share_posterior=True,
    guidance_floor=1.0,
    leading=frozenset({"ddim", "plms"}),
    largest_side=1024,
)
CONVENTIONS = {each.name: each for each in (Conventions(), DIFFUSERS)}


def get_conventions(name: str) -> Conventions:
    """Return the conventions of that name."""
    if name not in tuple(CONVENTIONS):
        raise EditValueError(f"no conventions '{name}'; there are: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
