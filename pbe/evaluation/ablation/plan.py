"""The stages of an ablation: what has to be made, in which order, and what rows can share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pbe.config import Config, to_dict
from pbe.data.shards.archive import shard_state
from pbe.data.toy.scenes import DEFAULT_WORLD
from pbe.errors import UserError
from pbe.evaluation.ablation.config import BY_ROW, PRIOR, TOY, TOY_CASES, Ablation, Row
from pbe.evaluation.ablation.measuring import (
    BENCHMARK,
    CASES,
    EXEMPLAR_AUC,
    OWN_BENCHMARK,
    POSE,
    SCORES,
    SCORES_FILE,
    identities,
)
from pbe.evaluation.ablation.stages import (
    SETTINGS_FILE,
    Stage,
    cache_settings,
    fingerprint_of,
    model_hash,
    project_command,
    shaping_settings,
)
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.metrics.scoring import METRICS, ScoreSettings
from pbe.files import sha256_of

FORMAT = 3  # of the stages' results; a newer one makes all of them again
VALIDATION_SEED = 1  # added to that of the training scenes
SHARDS, PICTURES = "shards", "pictures"
FOLDERS = {
    "scenes": "scenes", BENCHMARK: "benchmarks", OWN_BENCHMARK: "benchmarks", "cache": "caches",
    "training": "trainings", "edits": "edits", SCORES: "scores",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A row trained with one seed: the training's configuration, and the stages.

    ``own_edits`` is the stage of the edits from own exemplars, if there are any.
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
    """All stages, each once and after those it needs, and the cells that they are for, seeds within rows.

    ``benchmark`` is the folder of the cases, ``own_benchmark`` that of those with own exemplars, if they are
    edited, and ``results`` the folder of the tables, figures and the page.
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
    """Plan an ablation; nothing is made."""
    workspace, options = Path(ablation.config.workspace), ablation.config.evaluation
    for folder in (workspace, *workspace.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"the workspace '{workspace}' cannot be made: '{folder}' is a file")
    chosen = ScoreSettings(metrics=tuple(options.metrics)).chosen
    made = [name for metric in chosen for name in METRICS[metric].scores]
    made += [EXEMPLAR_AUC] if options.exemplar_auc else []
    made += POSE if options.own_exemplars else ()
    if options.plot_y not in ("", *made):
        raise UserError(f"'plot_y' is '{options.plot_y}', but only {', '.join(made)} are scored")
    if options.plot_x not in (BY_ROW, *made):
        raise UserError(
            f"'plot_x' is '{options.plot_x}'; it must be {BY_ROW}, or what is scored: {', '.join(made)}"
        )
    return _Planner(ablation).plan()


class _Planner:
    """Collects the stages of an ablation."""

    def __init__(self, ablation: Ablation) -> None:
        self.ablation, self.config = ablation, ablation.config
        self.workspace = Path(self.config.workspace)
        self.latents = self.workspace / "latents"  # the one latent cache, with a section for each settings
        self.stages: dict[str, Stage] = {}
        self.sha256 = cache(sha256_of)
        self._outside = identities(self.config.evaluation)

    def plan(self) -> Plan:
        """Return the stages of all rows and seeds, each made once however many rows need it."""
        cases, benchmark = self._benchmark()
        own = self._own_benchmark(cases, benchmark) if self.config.evaluation.own_exemplars else None
        pairs = [(row, seed) for row in self.ablation.rows for seed in self.config.seeds]
        trainings = [self._training_of(row, seed) for row, seed in pairs]
        cells = []
        for (row, seed), (config, training) in zip(pairs, trainings, strict=True):
            edits = [self._edits(row, seed, training, cases, benchmark)]
            if own is not None:
                edits.append(self._edits(row, seed, training, cases, own, " from own exemplars"))
            scores = self._scores(row, seed, edits, cases, benchmark)
            cells.append(Cell(row, seed, config, training, edits[0], scores, *edits[1:]))
        results = self.workspace / self.config.name
        return Plan(tuple(self.stages.values()), tuple(cells), benchmark, results, own)

    def _add(self, kind: str, name: str, mark: str, command: tuple[str, ...], **rest: Any) -> Stage:
        stage = Stage(name, kind, mark, self._folder(kind, mark), command, **rest)
        return self.stages.setdefault(mark, stage)

    def _folder(self, kind: str, mark: str) -> Path:
        return self.workspace / FOLDERS[kind] / mark[:12]

    def _measuring(self, kind: str, name: str, mark: str, **rest: Any) -> Stage:
        """Add a stage that :func:`pbe.evaluation.ablation.measuring.make` does."""
        folder = str(self._folder(kind, mark))
        return self._add(kind, name, mark, ("-m", "pbe.cli.ablate", kind, folder), **rest)

    def _scenes(self, split: str) -> Stage:
        """Add the rendering of a split; scenes are a function of their number and the seed."""
        scenes = self.config.scenes
        train = split == "train"
        count = scenes.train if train else scenes.validation
        seed = scenes.seed if train else scenes.seed + VALIDATION_SEED
        job = {"split": split, "count": count, "seed": seed, "recolour": scenes.recolour}
        mark = fingerprint_of(FORMAT, "scenes", job, self.sha256(DEFAULT_WORLD))
        command = project_command(
            "toy render", "--out", self._folder("scenes", mark) / SHARDS, "--split", split, "--scenes", count,
            "--seed", seed, "--workers", 0, *(("--recolour", scenes.recolour) if train else ()),
        )  # fmt: skip
        name = f"render {count} {split} scenes"
        return self._add("scenes", name, mark, command, units=count, rate="scene", makes=SHARDS)

    def _with_data(self, config: Config) -> tuple[Config, list[str], Any]:
        """Return the configuration with its shards, the stages that make them, and what they are."""
        if not self.config.scenes.train:
            patterns = (config.data.train_shards, config.data.validation_shards)
            return config, [], [shard_state(pattern) if pattern else [] for pattern in patterns]
        train, validation = self._scenes("train"), self._scenes("test")
        shards = [str(stage.folder / SHARDS) for stage in (train, validation)]
        data = replace(config.data, train_shards=shards[0], validation_shards=shards[1])
        needs = [train.fingerprint, validation.fingerprint]
        return replace(config, data=data), needs, needs

    def _training_of(self, row: Row, seed: int) -> tuple[Config, Stage]:
        config = self.ablation.training_config(row.overrides, f"row '{row.name}'")
        name = f"train {row.name}, seed {seed}"
        if row.start == PRIOR:  # trained with the first seed
            first, overrides = self.config.seeds[0], self.config.prior.overrides or {}
            own = self.ablation.training_config(overrides, "prior")
            _, prior = self._training(own, f"train the prior, seed {first}", first, "", [], [])
            start, needs = str(prior.folder / "model"), [prior.fingerprint]
            return self._training(config, name, seed, start, needs, needs)
        marks = [model_hash(Path(row.start), self.sha256)] if row.start else []
        return self._training(config, name, seed, row.start, [], marks)

    def _training(
        self, config: Config, name: str, seed: int, start: str, needs: list[str], marks: list[str]
    ) -> tuple[Config, Stage]:
        config, made, data = self._with_data(config)
        if config.task != "diffusion":
            raise UserError(f"{name}: 'task' is '{config.task}'; ablations train the diffusion model")
        if not start and config.autoencoder_from:
            marks = [*marks, self._autoencoder(config)]
        config = replace(config, seed=seed, init_from=start)
        mark = fingerprint_of(FORMAT, "training", shaping_settings(config), data, marks)
        needs = [*needs, *made]
        if config.cache.folder:
            needs.append(self._cache(config, made, data).fingerprint)
            config = replace(config, cache=replace(config.cache, folder=str(self.latents)))
        every = config.model.exemplar_encoder.tokens == "all"
        folder = self._folder("training", mark)
        config = replace(config, output_dir=str(folder))
        stage = self._with_config(
            "train", "training", name, mark, config, units=config.trainer.max_steps,
            rate="step_all_tokens" if every else "step", needs=tuple(needs), makes="model",
        )  # fmt: skip
        return config, stage

    def _with_config(
        self, program: str, kind: str, name: str, mark: str, config: Config, **rest: Any
    ) -> Stage:
        """Add a stage whose command reads a configuration of a training."""
        trainer = config.trainer
        gpus = int(trainer.devices) if trainer.devices.isdecimal() and kind == "training" else 1
        command = project_command(program, self._folder(kind, mark) / SETTINGS_FILE)
        return self._add(
            kind, name, mark, command, settings=to_dict(config),
            gpus=0 if trainer.accelerator == "cpu" else gpus, **rest,
        )  # fmt: skip

    def _cache(self, config: Config, made: list[str], data: Any) -> Stage:
        """Add the encoding of what a training takes; trainings with the same data settings share it."""
        count = max(self.config.scenes.train * config.cache.variants, 1)
        folder, encoder = str(self.latents), config.model.exemplar_encoder
        kind = "augmented" if config.data.sample.augment.enabled else "plain"
        name = f"encode samples, {kind}, tokens {encoder.tokens}, seed {config.seed}"
        needs, mark = tuple(made), self._cache_mark(config, data)
        every = replace(config.model, exemplar_encoder=replace(encoder, tokens="all"))
        larger = self._cache_mark(replace(config, model=every), data)  # holds these samples too
        if encoder.tokens != "all" and larger in self.stages:
            needs, count = (*made, larger), 1
        config = replace(config, init_from="", cache=replace(config.cache, folder=folder), output_dir=folder)
        return self._with_config(
            "cache", "cache", name, mark, config, units=count, rate="sample", needs=needs
        )

    def _cache_mark(self, config: Config, data: Any) -> str:
        if not config.autoencoder_from:
            raise UserError("'autoencoder_from' is empty: a latent cache needs the trained autoencoder")
        return fingerprint_of(FORMAT, "cache", cache_settings(config), data, self._autoencoder(config))

    def _autoencoder(self, config: Config) -> str:
        return model_hash(Path(config.autoencoder_from), self.sha256, "autoencoder.safetensors")

    def _benchmark(self) -> tuple[int, Path]:
        """Return the number of cases and the folder of the benchmark; the toy one is made first."""
        options = self.config.evaluation
        if options.benchmark != TOY:
            folder = Path(options.benchmark)
            if not folder.is_dir():
                raise UserError(f"'evaluation.benchmark' is '{folder}'; there is no such folder")
            return len(BenchmarkFolder(folder)), folder
        model = self.ablation.training_config({}, "base").model
        job = {
            "seed": options.benchmark_seed,
            "objects": options.objects,
            "image_size": model.image_size,
            "exemplar_size": model.exemplar_encoder.image_size,
        }
        mark = fingerprint_of(FORMAT, "benchmark", job, self.sha256(DEFAULT_WORLD))
        cases = options.objects or TOY_CASES
        name = f"make the benchmark, {cases} cases"
        stage = self._measuring(BENCHMARK, name, mark, units=cases, rate="scene", settings=job, makes=CASES)
        return cases, stage.folder / CASES

    def _own_benchmark(self, cases: int, benchmark: Path) -> Path:
        """Return the folder of the same cases with the hidden objects as exemplars."""
        size = self.ablation.training_config({}, "base").model.exemplar_encoder.image_size
        needs = self._makers(benchmark)
        mark = fingerprint_of(FORMAT, "own benchmark", needs, size, self._cases_mark(benchmark))
        stage = self._measuring(
            OWN_BENCHMARK, f"cut the exemplars out of {cases} cases", mark, units=cases, rate="scene",
            needs=tuple(needs), settings={"benchmark": str(benchmark), "exemplar_size": size}, makes=CASES,
        )  # fmt: skip
        return stage.folder / CASES

    def _edits(
        self, row: Row, seed: int, training: Stage, cases: int, benchmark: Path, title: str = ""
    ) -> Stage:
        options, sampling = self.config.evaluation, row.sampling
        settings = asdict(sampling) | {"seed": options.noise_seed, "batch_size": options.batch_size}
        needs = [training.fingerprint, *self._makers(benchmark)]
        mark = fingerprint_of(FORMAT, "edits", needs, settings, self._cases_mark(benchmark))
        command = project_command(
            "evaluate", "--edits-only", "--model", training.folder / "model", "--benchmark", benchmark,
            "--out", self._folder("edits", mark) / PICTURES, "--guidance", sampling.guidance_scale,
            "--solver", sampling.solver, "--steps", sampling.steps, "--seed", options.noise_seed,
            "--batch-size", options.batch_size, "--devices", 1,
        )  # fmt: skip
        branches = 1 if sampling.guidance_scale == 1.0 else 2
        return self._add(
            "edits", f"edit with {row.name}, seed {seed}{title}", mark, command, makes=PICTURES, gpus=1,
            units=cases * sampling.steps * branches, rate="edit_step", needs=tuple(needs),
        )  # fmt: skip

    def _scores(self, row: Row, seed: int, edits: list[Stage], cases: int, benchmark: Path) -> Stage:
        """Add the scores of a cell's edits; the second ones are those from own exemplars."""
        options = self.config.evaluation
        settings = {
            name: getattr(options, name) for name in ("metrics", "exemplar_auc", "resamples", "level")
        }
        needs = tuple(stage.fingerprint for stage in edits)
        mark = fingerprint_of(FORMAT, "scores", needs, settings | self._outside)  # nothing new where none
        settings |= {name: getattr(options, name) for name in self._outside}
        pictures = [str(stage.folder / PICTURES) for stage in edits] + [""]
        job = {"edits": pictures[0], "own_edits": pictures[1], "benchmark": str(benchmark), **settings}
        return self._measuring(
            SCORES, f"score {row.name}, seed {seed}", mark, units=cases, rate="score", needs=needs,
            settings=job, makes=SCORES_FILE, gpus=1 if "tower_weights" in settings else 0,
        )  # fmt: skip

    def _makers(self, benchmark: Path) -> list[str]:
        return [stage.fingerprint for stage in self.stages.values() if stage.folder == benchmark.parent]

    def _cases_mark(self, benchmark: Path) -> Any:
        """Return what the cases are, where no stage that makes them says so."""
        return None if self._makers(benchmark) else BenchmarkFolder(benchmark).sha256
