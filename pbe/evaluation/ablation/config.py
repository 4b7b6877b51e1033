"""What an ablation is: named rows of switches over one configuration, read from YAML and checked."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pbe.config import Config, ScheduleConfig, from_dict, load_config
from pbe.config.fields import described, flatten, number
from pbe.config.loading import one_line, read_yaml
from pbe.diffusion.solvers import get_solver
from pbe.errors import UserError

PRIOR, SCRATCH = "prior", ""
TOY = "toy"
BY_ROW = "row"
# Folders of a workspace that stages lie in; results lie in one with the name of their ablation.
STAGE_FOLDERS = ("scenes", "benchmarks", "latents", "caches", "trainings", "edits", "scores")
TOY_CASES = 181
MAX_SEED = 2**32 - 1  # Lightning's
# What the runner sets itself: where a run lies and how it is watched, not what comes out.
SET_HERE = ("output_dir", "seed", "init_from", "cache.folder", "trainer.threads", "trainer.resume")


@dataclass
class SamplingConfig:
    """How the benchmark is edited."""

    guidance_scale: float = 1.0
    """1 is no guidance"""
    solver: str = "plms"
    """name of a solver"""
    steps: int = 50
    """of the solver"""


@dataclass
class SamplingChange:
    """Those settings of :class:`SamplingConfig` that a row changes."""

    guidance_scale: float | None = None
    solver: str | None = None
    steps: int | None = None


@dataclass
class RowConfig:
    """A row. Those whose training is the same, such as ones that differ in ``sampling`` only, share one."""

    name: str = ""
    """letters, digits and ``-_.+``"""
    title: str = ""
    """shown instead of the name"""
    start: str | None = None
    """empty: from scratch; ``prior``; or the path of a model; None keeps what came before"""
    overrides: dict[str, Any] = field(default_factory=dict)
    """of the base configuration, by dotted keys"""
    sampling: SamplingChange = field(default_factory=SamplingChange)


@dataclass
class ScenesConfig:
    """Toy scenes to render for the training."""

    train: int = number(0)
    """how many; 0 takes the base's shards as they are"""
    validation: int = number(256, low=1)
    seed: int = number(0, high=MAX_SEED)
    recolour: float = 0.3


@dataclass
class PriorConfig:
    """The model that rows with ``start: prior`` begin with, trained once and with the first seed."""

    overrides: dict[str, Any] | None = None
    """of the base; None where there is none to be trained"""


@dataclass
class EvaluationConfig:
    """The fixed benchmark, its fixed noise, and what is measured."""

    benchmark: str = TOY
    """``toy``, or a folder in COCOEE's layout"""
    objects: int = 0
    """cases of the toy benchmark; 0 takes all"""
    benchmark_seed: int = number(0, high=MAX_SEED)
    noise_seed: int = number(0, high=MAX_SEED)
    batch_size: int = number(32, low=1)
    metrics: list[str] = field(default_factory=list)
    """of :data:`pbe.evaluation.metrics.scoring.METRICS`; empty means all"""
    tower_weights: dict[str, str] = field(default_factory=dict)
    """by tower: a file, for ``clip`` also a tag of open_clip"""
    mixture: str = ""
    """file of QS"""
    reference: str = ""
    """folder of real images"""
    exemplar_auc: bool = False
    """add the area under the curve of own against other exemplars, on the toy world's tower"""
    own_exemplars: bool = False
    """edit the cases once more, with the hidden objects as exemplars, and add what another pose costs"""
    plot_x: str = BY_ROW
    """score along the plot's x axis, or ``row``"""
    plot_y: str = ""
    """score along its y axis; empty: no plot"""
    strip_cases: int = number(10, low=1)
    resamples: int = number(2000, low=1)
    level: float = 0.95
    """of the intervals"""


@dataclass
class RatesConfig:
    """Seconds of one core that a unit takes, for the plan before anything is measured."""

    scene: float = 0.003
    sample: float = 0.02
    step: float = 0.19
    step_all_tokens: float = 0.32
    edit_step: float = 0.012
    score: float = 0.05


@dataclass
class AblationConfig:
    """A whole ablation; see ``configs/ablations/``."""

    name: str = ""
    """of the results' folder (default: the file's)"""
    title: str = ""
    base: str = ""
    """configuration file, relative to this one"""
    workspace: str = "outputs/ablations"
    """folder of all that is made, which several ablations may share"""
    seeds: list[int] = field(default_factory=lambda: [23])
    cumulative: bool = False
    """a row adds to the row before it, else to the base"""
    shared: dict[str, Any] = field(default_factory=dict)
    """overrides of every row and the prior"""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    comparisons: list[list[str]] = field(default_factory=list)
    """pairs of names of rows"""
    rates: RatesConfig = field(default_factory=RatesConfig)


@dataclass(frozen=True)
class Row:
    """A row with everything that it takes over from others; attributes as in :class:`RowConfig`."""

    name: str
    title: str
    start: str
    overrides: dict[str, Any]
    sampling: SamplingConfig


@dataclass(frozen=True)
class Ablation:
    """A checked ablation: its settings, the path of the base, and its resolved rows."""

    config: AblationConfig
    base: Path
    rows: tuple[Row, ...]

    def training_config(self, overrides: dict[str, Any], source: str) -> Config:
        """Return the base with the shared and these overrides; ``source`` is named in errors."""
        merged = {**self.config.shared, **overrides}
        if taken := sorted(set(merged) & set(SET_HERE)):
            raise UserError(f"{source}: '{taken[0]}' is set by the runner; a row cannot override it")
        try:
            return load_config(self.base, [f"{key}={json.dumps(value)}" for key, value in merged.items()])
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def load_ablation(path: str | Path) -> Ablation:
    """Read and check an ablation, a YAML file of :class:`AblationConfig` and of ``rows``, :class:`RowConfig`.

    With ``extends: {file: OTHER, row: NAME}`` what is not given is that ablation's, and its row is what these
    rows change.
    """
    return _load(Path(path), ())


def _load(path: Path, before: tuple[Path, ...]) -> Ablation:
    """Read an ablation that the ones before extend, each the next one."""
    content = _read(path)
    listed = content.pop("rows", None)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: 'rows' must be a list of at least one row")
    inherited, first = _extended(path, content.pop("extends", None), before)
    prior = content.get("prior")
    if isinstance(prior, dict) and not isinstance(prior.get("overrides"), dict | None):
        raise UserError(f"{path}: wrong value for 'prior.overrides': it is a section of keys")
    from_dict(AblationConfig, content, str(path))  # before a list could take a section's place
    merged: Any = OmegaConf.to_container(OmegaConf.merge(inherited, content))
    config = from_dict(AblationConfig, merged, str(path))
    config = replace(config, name=config.name or path.stem)
    rows = [_row(row, f"{path}: rows[{place}]") for place, row in enumerate(listed)]
    _check(config, rows, path)
    beginning = first or Row("", "", SCRATCH, {}, config.sampling)
    ablation = Ablation(config, path.parent / config.base, _resolve(config.cumulative, beginning, rows))
    for row in ablation.rows:
        training = ablation.training_config(row.overrides, f"{path}: row '{row.name}'")
        _check_sampling(row.sampling, training.model.schedule.timesteps, f"{path}: row '{row.name}'")
    if config.prior.overrides is not None:
        ablation.training_config(config.prior.overrides, f"{path}: prior")
    return ablation


def _extended(path: Path, reference: Any, before: tuple[Path, ...]) -> tuple[dict[str, Any], Row | None]:
    """Return the settings that an ablation takes over from another one, and the row that its rows change."""
    if reference is None:
        return {}, None
    if not isinstance(reference, dict) or set(reference) != {"file", "row"}:
        raise UserError(f"{path}: 'extends' names a 'file' beside this one and a 'row' of it")
    other = path.parent / str(reference["file"])
    chain = (*before, path)
    if other.resolve() in [one.resolve() for one in chain]:
        way = " extends ".join(f"'{one}'" for one in (*chain, other))
        raise UserError(f"{path}: it extends itself: {way}")
    parent = _load(other, chain)
    found = [row for row in parent.rows if row.name == reference["row"]]
    if not found:
        raise UserError(f"{path}: 'extends': there is no row '{reference['row']}' in '{other}'")
    settings = asdict(parent.config) | {"base": os.path.relpath(parent.base, path.parent)}
    own = ("name", "title", "cumulative", "comparisons")
    return {key: value for key, value in settings.items() if key not in own}, found[0]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no ablation at '{path}'; configs/ablations/ holds those that ship with the project")
    try:
        content: Any = OmegaConf.to_container(read_yaml(path), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    return {str(key): value for key, value in content.items()}


def _row(values: Any, source: str) -> RowConfig:
    if not isinstance(values, dict):
        raise UserError(f"{source}: a row is a mapping of keys to values")
    row = from_dict(RowConfig, values, source)
    if not row.name or not all(letter.isalnum() or letter in "-_.+" for letter in row.name):
        raise UserError(f"{source}: 'name' is '{row.name}'; it must be letters, digits, '-', '_', '.' or '+'")
    if "".join(row.title.splitlines()) != row.title:
        raise UserError(f"{source}: 'title' has a line break; it stands in one line of a table")
    return row


def _check(config: AblationConfig, rows: list[RowConfig], path: Path) -> None:
    _check_names(config, [row.name for row in rows], path)
    values, evaluation = flatten(asdict(config)), config.evaluation
    for key, item in described(AblationConfig):
        if "range" not in item.metadata:
            continue
        low, high = item.metadata["range"]
        if not low <= values[key] <= high:
            raise UserError(f"{path}: '{key}' has {values[key]}; it must be from {low} to {high}")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"{path}: 'seeds' must be given, each once")
    for seed in config.seeds:
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"{path}: 'seeds' has {seed}; seeds go from 0 to {MAX_SEED}")
    if not config.base:
        raise UserError(f"{path}: 'base' must name a configuration file")
    if any(row.start == PRIOR for row in rows) and config.prior.overrides is None:
        raise UserError(f"{path}: a row starts from the prior, but 'prior.overrides' is not given")
    if not 0.0 < evaluation.level < 1.0:
        raise UserError(f"{path}: 'evaluation.level' is {evaluation.level}; it is a level between 0 and 1")
    if evaluation.benchmark == TOY and not 0 <= evaluation.objects <= TOY_CASES:
        raise UserError(
            f"{path}: 'evaluation.objects' is {evaluation.objects}; there are {TOY_CASES}, 0 takes all"
        )


def _check_names(config: AblationConfig, rows: list[str], path: Path) -> None:
    """Check the names of the rows, and the ablation's, which is a folder of its own in the workspace."""
    if repeated := [name for name in rows if rows.count(name) > 1]:
        raise UserError(f"{path}: there are two rows '{repeated[0]}'")
    for pair in config.comparisons:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"{path}: 'comparisons' are pairs of two rows, not {pair}")
        if unknown := [name for name in pair if name not in rows]:
            raise UserError(f"{path}: 'comparisons': there is no row '{unknown[0]}'")
    name = config.name
    if Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise UserError(f"{path}: 'name' is '{name}'; it must be the plain name of a folder for the results")
    if name.lower() in STAGE_FOLDERS:
        raise UserError(f"{path}: 'name' is '{name}', a folder that stages lie in; give another one")


def _check_sampling(sampling: SamplingConfig, timesteps: int, source: str) -> None:
    try:
        get_solver(sampling.solver)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if sampling.steps < 1 or not 0.0 <= sampling.guidance_scale < float("inf"):
        raise UserError(f"{source}: steps must be at least 1, the guidance scale a number from 0 up")
    most = min(timesteps, ScheduleConfig().timesteps)  # editing allows no more than the latter
    if sampling.steps > most:
        raise UserError(f"{source}: steps is {sampling.steps}; the noise schedule has no more than {most}")


def _resolve(cumulative: bool, first: Row, rows: list[RowConfig]) -> tuple[Row, ...]:
    """Merge rows over what they begin with or, when they are cumulative, over the rows before them."""
    resolved: list[Row] = []
    for row in rows:
        before = resolved[-1] if resolved and cumulative else first
        changed = {name: value for name, value in vars(row.sampling).items() if value is not None}
        resolved.append(
            Row(
                row.name,
                row.title or row.name,
                before.start if row.start is None else row.start,
                {**before.overrides, **row.overrides},
                replace(before.sampling, **changed),
            )
        )
    return tuple(resolved)
