"""What an ablation is: named rows of switches over one configuration, read from YAML and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from pbe.config import Config, ScheduleConfig, from_dict, load_config
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
    """How the benchmark is edited; guidance scale 1 is no guidance."""

    guidance_scale: float = 1.0
    solver: str = "plms"
    steps: int = 50


@dataclass
class SamplingChange:
    """Those settings of :class:`SamplingConfig` that a row changes."""

    guidance_scale: float | None = None
    solver: str | None = None
    steps: int | None = None


@dataclass
class RowConfig:
    """A row: a name, overrides of the base configuration by dotted keys, and how it is sampled.

    ``start`` is empty (from scratch), ``prior``, or the path of a model; None keeps what came before. Rows
    whose training is the same, such as those that differ in ``sampling`` only, share one training.
    """

    name: str = ""
    title: str = ""
    start: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingChange = field(default_factory=SamplingChange)


@dataclass
class ScenesConfig:
    """Toy scenes to render for the training; with ``train`` 0 the base's shards are taken as they are."""

    train: int = 0
    validation: int = 256
    seed: int = 0
    recolour: float = 0.3


@dataclass
class PriorConfig:
    """The model that rows with ``start: prior`` begin with, trained once: overrides of the base.

    None where there is none to be trained. It is trained with the first seed.
    """

    overrides: dict[str, Any] | None = None


@dataclass
class EvaluationConfig:
    """The fixed benchmark, its fixed noise, and what is measured.

    ``benchmark`` is ``toy`` or a folder in COCOEE's layout; ``objects`` 0 takes all cases of the toy one.
    ``metrics`` are names of :data:`pbe.evaluation.metrics.scoring.METRICS`; empty means all.
    ``tower_weights`` (by tower: a file, for ``clip`` also a tag of open_clip), ``mixture`` (a file) and
    ``reference`` (a folder of real pictures) are what some of them need, as ``pbe evaluate`` takes it.
    ``exemplar_auc`` adds the area under the curve of own against other exemplars, on the toy world's tower.
    ``own_exemplars`` edits the cases once more, with the hidden objects themselves as exemplars, and adds
    what an exemplar in another pose costs; see :mod:`pbe.evaluation.ablation.pose`.
    The plot shows score ``plot_y`` against score ``plot_x``, or against the rows where that is ``row``.
    """

    benchmark: str = TOY
    objects: int = 0
    benchmark_seed: int = 0
    noise_seed: int = 0
    batch_size: int = 32
    metrics: list[str] = field(default_factory=list)
    tower_weights: dict[str, str] = field(default_factory=dict)
    mixture: str = ""
    reference: str = ""
    exemplar_auc: bool = False
    own_exemplars: bool = False
    plot_x: str = "row"
    plot_y: str = ""
    strip_cases: int = 10
    resamples: int = 2000
    level: float = 0.95


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
    """A whole ablation; see ``configs/ablations/``.

    ``base`` is a configuration file, relative to this one; ``shared`` overrides hold for every row and the
    prior. With ``cumulative`` a row adds to the row before it, else to the base. ``comparisons`` are pairs
    of row names. Whatever is made lies in ``workspace``, which several ablations may share.
    """

    name: str = ""
    title: str = ""
    base: str = ""
    workspace: str = "outputs/ablations"
    seeds: list[int] = field(default_factory=lambda: [23])
    cumulative: bool = False
    shared: dict[str, Any] = field(default_factory=dict)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    comparisons: list[list[str]] = field(default_factory=list)
    rates: RatesConfig = field(default_factory=RatesConfig)


@dataclass(frozen=True)
class Row:
    """A row with everything that it takes over from others.

    Attributes:
        name: a short word, unique.
        title: for tables.
        start: empty, ``prior`` or a path.
        overrides: of the base, by dotted key.
        sampling: how the benchmark is edited.
    """

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
        """Return the base with the shared and these overrides.

        Raises:
            UserError: an unknown key (the nearest valid one is named), a wrong value, or one that is not a
                row's to set.
        """
        merged = {**self.config.shared, **overrides}
        if taken := sorted(set(merged) & set(SET_HERE)):
            raise UserError(f"{source}: '{taken[0]}' is set by the runner; a row cannot override it")
        try:
            return load_config(self.base, [f"{key}={json.dumps(value)}" for key, value in merged.items()])
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def load_ablation(path: str | Path) -> Ablation:
    """Read and check an ablation.

    Args:
        path: YAML file: the keys of :class:`AblationConfig`, and ``rows``, a list of :class:`RowConfig`. With
            ``extends: {file: OTHER, row: NAME}`` what is not given is that ablation's, and its row is what
            these rows change.

    Raises:
        UserError: missing file, invalid YAML, unknown key (the nearest valid one is named), wrong value, or
            rows that do not fit together.
    """
    return _load(Path(path), ())


def _load(path: Path, before: tuple[Path, ...]) -> Ablation:
    """Read an ablation that the ones before extend, each the next one."""
    content = _read(path)
    listed = content.pop("rows", None)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: 'rows' must be a list of at least one row")
    inherited, first = _extended(path, content.pop("extends", None), before)
    _check_kinds(AblationConfig, content, str(path))
    merged = OmegaConf.to_container(OmegaConf.merge(inherited, content))
    assert isinstance(merged, dict)
    config = from_dict(AblationConfig, {str(key): value for key, value in merged.items()}, str(path))
    rows = [_row(row, f"{path}: rows[{number}]") for number, row in enumerate(listed)]
    _check(config, rows, path)
    base = path.parent / config.base
    beginning = first or Row("", "", SCRATCH, {}, config.sampling)
    config = replace(config, name=config.name or path.stem)
    _check_name(config.name, path)
    ablation = Ablation(config, base, _resolve(config.cumulative, beginning, rows))
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
    settings = asdict(parent.config)
    for own in ("name", "title", "cumulative", "comparisons"):
        settings.pop(own)
    settings["base"] = os.path.relpath(parent.base, path.parent)
    return settings, found[0]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no ablation at '{path}'; configs/ablations/ holds those that ship with the project")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # the YAML parser's errors share no base class with OmegaConf's
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: an ablation is a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def _row(values: Any, source: str) -> RowConfig:
    if not isinstance(values, dict):
        raise UserError(f"{source}: a row is a mapping of keys to values")
    _check_kinds(RowConfig, values, source)
    row = from_dict(RowConfig, values, source)
    if not row.name or not all(letter.isalnum() or letter in "-_.+" for letter in row.name):
        raise UserError(f"{source}: 'name' is '{row.name}'; it must be letters, digits, '-', '_', '.' or '+'")
    if "".join(row.title.splitlines()) != row.title:
        raise UserError(f"{source}: 'title' has a line break; it stands in one line of a table")
    return row


def _check_kinds(cls: type, values: dict[str, Any], source: str, prefix: str = "") -> None:
    """Refuse a list where a mapping belongs and the other way round, which OmegaConf cannot say clearly."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in hints or not isinstance(value, dict | list):
            continue  # the strict reading that follows has a word for these
        hint = hints[key]
        hint = get_args(hint)[0] if isinstance(hint, UnionType) else hint  # such as dict | None
        kind = get_origin(hint) or hint
        wanted = (
            "list" if kind is list else "mapping" if kind is dict or is_dataclass(kind) else "single value"
        )
        given = "list" if isinstance(value, list) else "mapping"
        if wanted != given:
            raise UserError(f"{source}: '{prefix}{key}' is a {given}; it must be a {wanted}")
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
            _check_kinds(kind, value, source, f"{prefix}{key}.")


def _check_name(name: str, path: Path) -> None:
    """Refuse a name that is no folder of its own in the workspace."""
    if Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise UserError(f"{path}: 'name' is '{name}'; it must be the plain name of a folder for the results")
    if name.lower() in STAGE_FOLDERS:
        raise UserError(f"{path}: 'name' is '{name}', a folder that stages lie in; give another one")


def _seeds(config: AblationConfig) -> Iterator[tuple[str, int]]:
    yield from (("seeds", seed) for seed in config.seeds)
    yield "scenes.seed", config.scenes.seed
    yield "evaluation.benchmark_seed", config.evaluation.benchmark_seed
    yield "evaluation.noise_seed", config.evaluation.noise_seed


def _check(config: AblationConfig, rows: list[RowConfig], path: Path) -> None:
    names = [row.name for row in rows]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: there are two rows '{repeated[0]}'")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"{path}: 'seeds' must be given, each once")
    for key, seed in _seeds(config):
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"{path}: '{key}' has {seed}; seeds go from 0 to {MAX_SEED}")
    if not config.base:
        raise UserError(f"{path}: 'base' must name a configuration file")
    for pair in config.comparisons:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"{path}: 'comparisons' are pairs of two rows, not {pair}")
        if unknown := [name for name in pair if name not in names]:
            raise UserError(f"{path}: 'comparisons': there is no row '{unknown[0]}'")
    if any(row.start == PRIOR for row in rows) and config.prior.overrides is None:
        raise UserError(f"{path}: a row starts from the prior, but 'prior.overrides' is not given")
    numbers = config.evaluation
    if numbers.batch_size < 1 or numbers.resamples < 1 or not 0.0 < numbers.level < 1.0:
        raise UserError(f"{path}: 'evaluation': batch_size and resamples from 1 up, level between 0 and 1")
    if config.scenes.train < 0 or config.scenes.validation < 1 or numbers.strip_cases < 1:
        raise UserError(f"{path}: scenes.train from 0, scenes.validation and strip_cases from 1 up")
    if numbers.benchmark == TOY and not 0 <= numbers.objects <= TOY_CASES:
        raise UserError(
            f"{path}: 'evaluation.objects' is {numbers.objects}; there are {TOY_CASES}, 0 takes all"
        )


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
