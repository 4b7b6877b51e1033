"""The stages of an ablation: what has to be made, in which order, and what rows can share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pbe.config import Config, to_dict
from pbe.data.shards.archive import shard_state
from pbe.data.toy.scenes import DEFAULT_WORLD
from pbe.errors import UserError
from pbe.evaluation.ablation.auc import NAME as EXEMPLAR_AUC
from pbe.evaluation.ablation.config import BY_ROW, PRIOR, TOY, TOY_CASES, Ablation, Row
from pbe.evaluation.ablation.fingerprints import FileHashes, cache_settings, shaping_settings
from pbe.evaluation.ablation.pose import NAMES as POSE
from pbe.evaluation.ablation.scoring import identities
from pbe.evaluation.ablation.stages import Stage, fingerprint_of
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.metrics.scoring import METRICS, ScoreSettings

FORMAT = 3  # of the stages' results; a newer one makes all of them again
VALIDATION_SEED = 1  # added to that of the training scenes


@dataclass(frozen=True)
class Cell:
    """A row trained with one seed.

    Attributes:
        row: with its switches.
        seed: of the training.
        config: the training's configuration.
        training: its stage; edits and scores come after it.
        edits: its stage.
        scores: its stage.
        own_edits: the stage of the edits from own exemplars, if there are any.
    """

    row: Row
    seed: int
    config: Config
    training: Stage
    edits: Stage
    scores: Stage
    own_edits: Stage | None = None

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.training.folder / "model"


@dataclass(frozen=True)
class Plan:
    """All stages, each once and after those it needs, and the cells that they are for.

    Attributes:
        stages: what is to be made.
        cells: every row with every seed, seeds within rows.
        benchmark: folder of the cases.
        results: folder of the tables, figures and the page.
        own_benchmark: folder of the cases with own exemplars, if they are edited.
    """

    stages: tuple[Stage, ...]
    cells: tuple[Cell, ...]
    benchmark: Path
    results: Path
    own_benchmark: Path | None = None

    def of(self, row: str) -> list[Cell]:
        """Return the cells of a row, by seed."""
        return [cell for cell in self.cells if cell.row.name == row]


def make_plan(ablation: Ablation) -> Plan:
    """Plan an ablation; nothing is made.

    Raises:
        UserError: data, models, a benchmark or scores that the ablation names are not there.
    """
    _check_workspace(Path(ablation.config.workspace))
    _check_scores(ablation)
    return _Planner(ablation).plan()


def _check_workspace(workspace: Path) -> None:
    """Refuse a workspace that cannot be made; nothing is made."""
    for folder in (workspace, *workspace.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"the workspace '{workspace}' cannot be made: '{folder}' is a file")


def _check_scores(ablation: Ablation) -> None:
    """Refuse scores that there are not before any time is spent on what is to be scored."""
    options = ablation.config.evaluation
    chosen = ScoreSettings(metrics=tuple(options.metrics)).chosen
    made = [name for metric in chosen for name in METRICS[metric].scores or (metric,)]
    made += [EXEMPLAR_AUC] if options.exemplar_auc else []
    made += POSE if options.own_exemplars else ()
    if options.plot_y not in ("", *made):
        raise UserError(f"'plot_y' is '{options.plot_y}', but only {', '.join(made)} are scored")
    if options.plot_x not in (BY_ROW, *made):
        raise UserError(
            f"'plot_x' is '{options.plot_x}'; it must be {BY_ROW}, or what is scored: {', '.join(made)}"
        )


class _Planner:
    """Collects the stages of an ablation.

    Args:
        ablation: checked settings.
    """

    def __init__(self, ablation: Ablation) -> None:
        self.ablation, self.config = ablation, ablation.config
        self.workspace = Path(self.config.workspace)
        self.latents = self.workspace / "latents"  # the one latent cache, with a section for each settings
        self.stages: dict[str, Stage] = {}
        self.hashes = FileHashes()
        self._outside = identities(self.config.evaluation)

    def plan(self) -> Plan:
        """Return the stages of all rows and seeds, each made once however many rows need it."""
        cases, benchmark = self._benchmark()
        own = self._own_benchmark(cases, benchmark) if self.config.evaluation.own_exemplars else None
        cells: dict[tuple[str, int], Cell] = {}
        trainings: dict[tuple[str, int], tuple[Config, Stage]] = {}
        rows = self.ablation.rows
        for row in rows:
            for seed in self.config.seeds:
                trainings[row.name, seed] = self._training_of(row, seed)
        for row in rows:
            for seed in self.config.seeds:
                config, training = trainings[row.name, seed]
                edits = self._edits(row, seed, training, cases, benchmark)
                again = None
                if own is not None:
                    again = self._edits(row, seed, training, cases, own, " from own exemplars")
                scores = self._scores(row, seed, [edits, again] if again else [edits], cases, benchmark)
                cells[row.name, seed] = Cell(row, seed, config, training, edits, scores, again)
        results = self.workspace / self.config.name
        return Plan(tuple(self.stages.values()), tuple(cells.values()), benchmark, results, own)

    def _add(self, kind: str, name: str, fingerprint: str, folder: str, **rest: Any) -> Stage:
        stage = Stage(name, kind, fingerprint, self.workspace / folder / fingerprint[:12], **rest)
        return self.stages.setdefault(fingerprint, stage)

    # --- what trainings start from -----------------------------------------------------------------

    def _scenes(self, split: str) -> Stage:
        """Add the rendering of a split; scenes are a function of their number and the seed."""
        scenes = self.config.scenes
        train = split == "train"
        job = {
            "split": split,
            "count": scenes.train if train else scenes.validation,
            "seed": scenes.seed if train else scenes.seed + VALIDATION_SEED,
            "recolour": scenes.recolour,
        }
        mark = fingerprint_of(FORMAT, "scenes", job, self.hashes.of(DEFAULT_WORLD))
        name = f"render {job['count']} {split} scenes"
        return self._add("scenes", name, mark, "scenes", units=job["count"], rate="scene", job=job)

    def _with_data(self, config: Config) -> tuple[Config, list[str], Any]:
        """Return the configuration with its shards, the stages that make them, and what they are."""
        if not self.config.scenes.train:
            patterns = (config.data.train_shards, config.data.validation_shards)
            return config, [], [shard_state(pattern) if pattern else [] for pattern in patterns]
        train, validation = self._scenes("train"), self._scenes("test")
        data = replace(
            config.data,
            train_shards=str(train.folder / "shards"),
            validation_shards=str(validation.folder / "shards"),
        )
        needs = [train.fingerprint, validation.fingerprint]
        return replace(config, data=data), needs, needs

    def _training_of(self, row: Row, seed: int) -> tuple[Config, Stage]:
        config = self.ablation.training_config(row.overrides, f"row '{row.name}'")
        if row.start == PRIOR:
            prior = self._prior()
            start, needs = str(prior.folder / "model"), [prior.fingerprint]
            return self._training(config, f"train {row.name}, seed {seed}", seed, start, needs, needs)
        marks = [self.hashes.of_model(Path(row.start))] if row.start else []
        return self._training(config, f"train {row.name}, seed {seed}", seed, row.start, [], marks)

    def _prior(self) -> Stage:
        """Add the training of the model that rows start from, with the first seed."""
        overrides, seed = self.config.prior.overrides or {}, self.config.seeds[0]
        config = self.ablation.training_config(overrides, "prior")
        return self._training(config, f"train the prior, seed {seed}", seed, "", [], [])[1]

    def _training(
        self, config: Config, name: str, seed: int, start: str, needs: list[str], marks: list[str]
    ) -> tuple[Config, Stage]:
        config, made, data = self._with_data(config)
        if config.task != "diffusion":
            raise UserError(f"{name}: 'task' is '{config.task}'; ablations train the diffusion model")
        if not start and config.autoencoder_from:
            marks = [*marks, self.hashes.of_model(Path(config.autoencoder_from), "autoencoder.safetensors")]
        config = replace(config, seed=seed, init_from=start)
        mark = fingerprint_of(FORMAT, "training", shaping_settings(config), data, marks)
        needs = [*needs, *made]
        if config.cache.folder:
            cache = self._cache(config, made, data)
            needs.append(cache.fingerprint)
            config = replace(config, cache=replace(config.cache, folder=str(self.latents)))
        every = config.model.exemplar_encoder.tokens == "all"
        config = replace(config, output_dir=str(self.workspace / "trainings" / mark[:12]))
        stage = self._add(
            "training", name, mark, "trainings", units=config.trainer.max_steps,
            rate="step_all_tokens" if every else "step", needs=tuple(needs), job={"config": to_dict(config)},
        )  # fmt: skip
        return config, stage

    def _cache(self, config: Config, made: list[str], data: Any) -> Stage:
        """Add the encoding of what a training takes; trainings with the same data settings share it."""
        mark = self._cache_mark(config, data)
        count = max(self.config.scenes.train * config.cache.variants, 1)
        folder = str(self.latents)
        job = {
            "config": to_dict(
                replace(config, init_from="", cache=replace(config.cache, folder=folder), output_dir=folder)
            )
        }
        sample = config.data.sample
        kind = "augmented" if sample.augment.enabled else "plain"
        tokens = config.model.exemplar_encoder.tokens
        name = f"encode samples, {kind}, tokens {tokens}, seed {config.seed}"
        needs = tuple(made)
        if (larger := self._larger(config, data)) is not None:  # holds these samples too
            needs, count = (*made, larger), 1
        return self._add("cache", name, mark, "caches", units=count, rate="sample", needs=needs, job=job)

    def _larger(self, config: Config, data: Any) -> str | None:
        """Return the stage that encodes the same samples with all tokens, if there is one already."""
        encoder = config.model.exemplar_encoder
        if encoder.tokens == "all":
            return None
        every = replace(config.model, exemplar_encoder=replace(encoder, tokens="all"))
        mark = self._cache_mark(replace(config, model=every), data)
        return mark if mark in self.stages else None

    def _cache_mark(self, config: Config, data: Any) -> str:
        return fingerprint_of(FORMAT, "cache", cache_settings(config), data, self._encoders(config))

    def _encoders(self, config: Config) -> str:
        if not config.autoencoder_from:
            raise UserError("'autoencoder_from' is empty: a latent cache needs the trained autoencoder")
        return self.hashes.of_model(Path(config.autoencoder_from), "autoencoder.safetensors")

    # --- what is measured -----------------------------------------------------------------------------

    def _benchmark(self) -> tuple[int, Path]:
        """Return the number of cases and the folder of the benchmark; the toy one is made first."""
        options = self.config.evaluation
        if options.benchmark != TOY:
            folder = Path(options.benchmark)
            if not folder.is_dir():
                raise UserError(f"'evaluation.benchmark' is '{folder}'; there is no such folder")
            return len(BenchmarkFolder(folder)), folder
        config = self.ablation.training_config({}, "base")
        job = {
            "seed": options.benchmark_seed,
            "objects": options.objects,
            "image_size": config.model.image_size,
            "exemplar_size": config.model.exemplar_encoder.image_size,
        }
        mark = fingerprint_of(FORMAT, "benchmark", job, self.hashes.of(DEFAULT_WORLD))
        cases = options.objects or TOY_CASES
        stage = self._add(
            "benchmark", f"make the benchmark, {cases} cases", mark, "benchmarks",
            units=cases, rate="scene", job=job,
        )  # fmt: skip
        return cases, stage.folder / "cases"

    def _own_benchmark(self, cases: int, benchmark: Path) -> Path:
        """Return the folder of the same cases with the hidden objects as exemplars."""
        size = self.ablation.training_config({}, "base").model.exemplar_encoder.image_size
        needs = self._makers(benchmark)
        mark = fingerprint_of(FORMAT, "own benchmark", needs, size, self._cases_mark(benchmark))
        stage = self._add(
            "own benchmark", f"cut the exemplars out of {cases} cases", mark, "benchmarks",
            units=cases, rate="scene", needs=tuple(needs),
            job={"benchmark": str(benchmark), "exemplar_size": size},
        )  # fmt: skip
        return stage.folder / "cases"

    def _edits(
        self, row: Row, seed: int, training: Stage, cases: int, benchmark: Path, title: str = ""
    ) -> Stage:
        options = self.config.evaluation
        settings = asdict(row.sampling) | {"seed": options.noise_seed, "batch_size": options.batch_size}
        needs = [training.fingerprint, *self._makers(benchmark)]
        mark = fingerprint_of(FORMAT, "edits", needs, settings, self._cases_mark(benchmark))
        branches = 1 if row.sampling.guidance_scale == 1.0 else 2
        job = {
            "model": str(training.folder / "model"),
            "benchmark": str(benchmark),
            "settings": settings,
        }
        return self._add(
            "edits", f"edit with {row.name}, seed {seed}{title}", mark, "edits",
            units=cases * row.sampling.steps * branches, rate="edit_step", needs=tuple(needs), job=job,
        )  # fmt: skip

    def _scores(self, row: Row, seed: int, edits: list[Stage], cases: int, benchmark: Path) -> Stage:
        """Add the scores of a cell's edits; the second ones are those from own exemplars."""
        options = self.config.evaluation
        names = ("metrics", "exemplar_auc", "resamples", "level")
        settings = {name: getattr(options, name) for name in names}
        needs = tuple(stage.fingerprint for stage in edits)
        mark = fingerprint_of(FORMAT, "scores", needs, settings | self._outside)  # nothing new where none
        settings |= {name: getattr(options, name) for name in self._outside}
        pictures = [str(stage.folder / "pictures") for stage in edits] + [""]
        job = {"edits": pictures[0], "own_edits": pictures[1], "benchmark": str(benchmark), **settings}
        return self._add(
            "scores", f"score {row.name}, seed {seed}", mark, "scores",
            units=cases, rate="score", needs=needs, job=job,
        )  # fmt: skip

    def _makers(self, benchmark: Path) -> list[str]:
        return [stage.fingerprint for stage in self.stages.values() if stage.folder == benchmark.parent]

    def _cases_mark(self, benchmark: Path) -> Any:
        if self._makers(benchmark):
            return None  # the stage that makes them says what they are
        return BenchmarkFolder(benchmark).sha256
