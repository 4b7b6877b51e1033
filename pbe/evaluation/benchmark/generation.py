"""Edits of a benchmark's cases: by one call, or of all of them as PNGs, on all devices through Lightning.

The same settings give the same files, to the byte on one kind of machine: a case's noise belongs to
(seed, id), cases are edited in groups that depend on their position only (rounding follows the batch), and
each process has a fixed number of CPU threads. Processes, machines and restarts change nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from PIL import Image
from pytorch_lightning.strategies import StrategyRegistry
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader
from tqdm import tqdm

from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.tensors import DTYPES
from pbe.cluster import RayCluster
from pbe.config import ModelConfig, ScheduleConfig
from pbe.data.randomness import generator
from pbe.diffusion.solvers import FEW_STEPS_SOLVER, get_solver
from pbe.editing.batch.records import write_image
from pbe.editing.engine import choose_solver
from pbe.editing.images import to_bytes
from pbe.editing.loading import Hub
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import EditSettings, get_conventions
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import MODELS_OWN, claim_folder, is_whole, model_identity
from pbe.evaluation.metrics.base import Case
from pbe.training.setup import MISFIT, cluster

# What Lightning says of things that are meant to be so: batches are small and read by the main process.
NEEDLESS_ADVICE = (
    "does not have many workers",
    "GPU available but not used",
    r"`isinstance\(treespec",
    "across ranks is zero",
    "predict returned None",
)
LAUNCHED = {"TORCHELASTIC_RUN_ID", "LOCAL_RANK"}  # variables of torchrun and of Lightning
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
TIMESTEPS = ScheduleConfig().timesteps  # of every model known
GROUPS_A_PROCESS = 2  # fewer are not worth the start of another process on the CPU


@dataclass(frozen=True)
class GenerateSettings:
    """How a benchmark is edited. Where it runs is not part of what the images are.

    Attributes:
        guidance_scale: at least 0; 1 turns guidance off.
        solver: name of one, see :data:`pbe.diffusion.solvers.SOLVERS`; None is ``lcm`` for a model of few
            steps, and that of :attr:`USUAL` for others.
        steps: of the solver; None is what the model is meant for.
        seed: of the noise, together with the case's id.
        batch_size: cases edited at once; part of the settings, since rounding follows it.
        dtype: of the weights: ``fp32``, ``fp16`` or ``bf16``.
        preserve_background: keep every pixel outside the mask; off, as in the original, they pass through
            autoencoder and diffusion.
        conventions: of preparing the inputs, ``original`` or ``diffusers``; None is the model's.
        raw_weights: the plain weights of a training instead of the averaged ones.
        threads: CPU threads of each process; part of the settings for the same reason. GPUs do not care.
        accelerator: Lightning's: ``auto``, ``cpu``, ``gpu``, ...
        devices: how many; ``auto`` is all GPUs, or as many processes as torch would use CPU threads.
        strategy: Lightning's; ``auto`` starts processes where there are several devices.
        num_nodes: machines, started by torchrun or SLURM.
        engine: ``local``, or ``ray``: tasks on a cluster, each on one of ``devices``; ``auto`` is all it has.
        progress: show a bar.
    """

    USUAL: ClassVar[tuple[str, int]] = ("plms", 50)

    guidance_scale: float = 5.0
    solver: str | None = None
    steps: int | None = None
    seed: int = 0
    batch_size: int = 8
    dtype: str = "fp32"
    preserve_background: bool = True
    conventions: str | None = None
    raw_weights: bool = False
    threads: int = 1
    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    engine: str = "local"
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be used before any time is spent on it."""
        if self.solver is not None:
            get_solver(self.solver)
        if self.conventions is not None:
            get_conventions(self.conventions)
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise UserError(f"the guidance scale is {self.guidance_scale}; it must be a number from 0 up")
        for name in ("steps", "batch_size", "threads", "num_nodes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.steps is not None and self.steps > TIMESTEPS:
            raise UserError(f"steps is {self.steps}; the noise schedule has no more than {TIMESTEPS}")
        known = ("auto", *StrategyRegistry.available_strategies())
        if self.strategy not in known:
            raise UserError(f"there is no strategy '{self.strategy}'; there are: {', '.join(known)}")
        if self.engine == "ray" and (self.num_nodes > 1 or self.strategy != "auto"):
            raise UserError("the engine ray takes no strategy and no num_nodes: the cluster has its machines")
        if self.num_nodes > 1 and not (launched() or "MASTER_ADDR" in os.environ):
            raise UserError(f"num_nodes is {self.num_nodes}, but neither torchrun nor SLURM started this")
        if self.devices != "auto" and not (str(self.devices).isdecimal() and int(self.devices) > 0):
            raise UserError(f"devices is '{self.devices}'; it must be a number from 1 up, or auto")

    def completed(self, sizes: ModelConfig) -> Self:
        """Return the settings with the solver and steps that a model is meant for, where they name none."""
        few = sizes.unet.few_steps
        solver, steps = (FEW_STEPS_SOLVER.name, few) if few else self.USUAL
        return replace(self, solver=self.solver or solver, steps=self.steps or steps)

    def call(self, sizes: ModelConfig) -> dict[str, Any]:
        """Return the arguments of :meth:`PaintByExample.edit` for a model.

        They name the steps, also where these are the 50 that the call takes for not named.
        """
        settings = self.completed(sizes)
        assert settings.solver is not None
        how = EditSettings(
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            preserve_background=settings.preserve_background,
            conventions=settings.conventions,  # type: ignore[arg-type]  # was checked
        )
        return {"settings": how.checked(), "choice": choose_solver(settings.solver)}

    def identity(self) -> dict[str, Any]:
        """Return the settings that images depend on."""
        fields = asdict(self)
        where = ("accelerator", "devices", "strategy", "num_nodes", "engine", "progress")
        identity = {name: value for name, value in fields.items() if name not in where}
        return identity | {"conventions": self.conventions or MODELS_OWN}


def groups_of(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Split positions into runs of at most ``batch_size`` neighbours with images of one (height, width)."""
    groups: list[list[int]] = []
    for position, size in enumerate(sizes):
        last = groups[-1] if groups else []
        if last and len(last) < batch_size and sizes[last[0]] == size:
            last.append(position)
        else:
            groups.append([position])
    return groups


def at_scales(settings: GenerateSettings, scales: Sequence[float]) -> list[GenerateSettings]:
    """Return the settings at each guidance scale; there must be one, and each once."""
    if not scales or len({f"{scale:g}" for scale in scales}) != len(scales):
        raise UserError("guidance scales must be given, each once")
    return [replace(settings, guidance_scale=scale) for scale in scales]


def noise_of(seed: int, key: str | int) -> torch.Generator:
    """Return torch's CPU generator for the noise of the case with that key, its id as a rule."""
    return torch.Generator().manual_seed(int(generator(seed, "edit-noise", key).integers(2**62)))


def edit_batch(
    pipe: PaintByExample,
    cases: Sequence[Case],
    settings: GenerateSettings,
    exemplars: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Edit some cases of one size at once, with their own exemplars or others; return uint8 ``b h w 3``.

    Noise belongs to (seed, case), not to the batch.
    """
    output = pipe.edit(
        [case.exemplar for case in cases] if exemplars is None else list(exemplars),
        [case.image for case in cases],
        [case.mask for case in cases],
        **settings.call(pipe.model.config),
        generator=[noise_of(settings.seed, case.noise_key) for case in cases],
        output_type="np",
    )
    return to_bytes(output.images)


class _EditTask(pl.LightningModule):
    """Edits the groups of a benchmark that belong to this process, and writes their files.

    Of the ``part`` (i, n) these are every n-th group, from the i-th on.
    """

    def __init__(
        self,
        model: Path | PaintByExample,
        benchmark: BenchmarkFolder,
        folder: Path,
        settings: GenerateSettings,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.source, self.benchmark, self.folder, self.settings = model, benchmark, folder, settings
        self.part = part
        self.groups = groups_of(benchmark.sizes, settings.batch_size)[part[0] :: part[1]]

    @property
    def left(self) -> int:
        """Number of groups that have a file to come."""
        return sum(1 for group in self.groups if self._missing(group))

    def setup(self, stage: str) -> None:
        """Be quiet in processes that Lightning started, too."""
        _quieten()
        self.at_sigterm = signal.getsignal(signal.SIGTERM)

    def predict_dataloader(self) -> DataLoader[int]:
        """Return the numbers of this process' groups that have a file to come.

        Which process has a group depends on its number alone, not on what another has written meanwhile.
        """
        mine = range(self.trainer.global_rank, len(self.groups), self.trainer.world_size)
        left = [number for number in mine if self._missing(self.groups[number])]
        return DataLoader(left, batch_size=None, num_workers=0)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        """Load the model, once in each process and on its device."""
        torch.set_num_threads(self.settings.threads)
        if threading.current_thread() is threading.main_thread():  # Lightning's own handler only takes note
            signal.signal(signal.SIGTERM, self.at_sigterm)
        if isinstance(self.source, PaintByExample):
            self.pipe = self.source.to(self.device)
        else:
            dtype, raw = DTYPES[self.settings.dtype], self.settings.raw_weights
            self.pipe = PaintByExample.from_pretrained(
                self.source, dtype=dtype, device=self.device, safety_checker=None, raw_weights=raw
            )
        self.pipe.set_progress_bar_config(disable=True)

    def teardown(self, stage: str) -> None:
        """Wait for the other processes: all files are there afterwards."""
        self.trainer.strategy.barrier("edits")

    def predict_step(self, batch: int, batch_idx: int) -> None:
        """Edit a whole group, and write those files that are missing."""
        group = self.groups[batch]
        missing = set(self._missing(group))
        cases = [self.benchmark[position] for position in group]
        for position, edit in zip(group, edit_batch(self.pipe, cases, self.settings), strict=True):
            if position in missing:
                write_image(self._path(position), Image.fromarray(edit))

    def _path(self, position: int) -> Path:
        return self.folder / f"{self.benchmark.ids[position]}.png"

    def _missing(self, group: Sequence[int]) -> list[int]:
        sizes = self.benchmark.sizes
        return [position for position in group if not is_whole(self._path(position), sizes[position])]


def generate(
    model: str | Path | PaintByExample,
    benchmark: BenchmarkFolder,
    out_folder: str | Path,
    settings: GenerateSettings | None = None,
) -> Path:
    """Write ``<id>.png`` for every case of a benchmark; started again, only for those that are missing.

    With Lightning's ``ddp`` every process runs the whole script; all return from here when all are done.

    Args:
        model: as :meth:`PaintByExample.from_pretrained` takes it, loaded by each process; or a pipeline.
        benchmark: the cases.
        out_folder: made when missing, and returned; its ``settings.json`` says what made the edits.
        settings: how to edit; None means the defaults.
    """
    settings, folder = settings or GenerateSettings(), Path(out_folder)
    source = model if isinstance(model, PaintByExample) else Hub().find(str(model))
    settings = settings.completed(_sizes(source))
    claim_folder(folder, model_identity(source), benchmark, settings.identity())
    task = _EditTask(source, benchmark, folder, settings)
    if settings.engine == "ray" and task.left:
        _edit_on_ray(task)
    else:
        _edit(task)  # all processes find the same to do: none writes before all have looked
    return folder


def _sizes(source: Path | PaintByExample) -> ModelConfig:
    return source.model.config if isinstance(source, PaintByExample) else open_checkpoint(source).config


def _edit_on_ray(task: _EditTask) -> None:
    """Share the groups out among tasks of a cluster, one for each of its devices; files are the results.

    A task that a lost node had starts again on another one, with what is left of its part.
    """
    settings, left = task.settings, task.left
    cluster = RayCluster(settings.threads)
    gpus = cluster.count("GPU") if settings.accelerator in ("auto", "gpu") else 0
    every = gpus or cluster.count("CPU") // settings.threads
    wanted = every if settings.devices == "auto" else int(settings.devices)
    parts = max(1, min(wanted, left if gpus else left // GROUPS_A_PROCESS))
    alone = replace(settings, engine="local", devices=1, progress=False)
    given = (task.source, task.benchmark, task.folder, alone)
    calls = [(_EditTask(*given, (number, parts)),) for number in range(parts)]
    ended = cluster.completed(_edit, calls, most=wanted, gpus=1 if gpus else 0)
    for _ in tqdm(ended, total=parts, desc="edit", unit="part", disable=not settings.progress):
        pass


def _edit(task: _EditTask) -> None:
    """Edit what is left of a task, in this process and those that its settings ask for."""
    if left := task.left:
        _predict(task, _trainer(task.settings, left))


def _quieten() -> None:
    """Keep needless advice off the screen, in this process."""
    for text in NEEDLESS_ADVICE:
        warnings.filterwarnings("ignore", f".*{text}")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def _predict(task: _EditTask, trainer: pl.Trainer) -> None:
    """Run the task; what it raises is what went wrong, also where that was in another process."""
    threads, interrupts = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            _quieten()
            trainer.predict(task, return_predictions=False)
    except ProcessRaisedException as error:
        raise _reported(error) from error
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, interrupts)  # which Lightning turned off before it asked to exit
        raise KeyboardInterrupt from error
    finally:
        torch.set_num_threads(threads)


def is_first_process() -> bool:
    """Tell whether this process speaks for all; the others end when their share is done."""
    return not any(int(os.environ.get(name) or 0) for name in RANKS)


def launched() -> bool:
    """Tell whether this process is one of several that torchrun, srun or Lightning has started."""
    return bool(os.environ.keys() & LAUNCHED) or isinstance(cluster(), SLURMEnvironment)


def _trainer(settings: GenerateSettings, groups: int) -> pl.Trainer:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # which advertises as it is made
    devices, strategy, environment = settings.devices, settings.strategy, cluster()
    gpus, one_of_several = torch.cuda.is_available() and settings.accelerator != "cpu", launched()
    if devices == "auto" and not gpus and not one_of_several:
        devices = min(torch.get_num_threads(), max(1, groups // GROUPS_A_PROCESS))
    several = int(devices) > 1 if str(devices).isdecimal() else gpus and torch.cuda.device_count() > 1
    if strategy == "auto" and several:
        strategy = "ddp" if one_of_several else "ddp_spawn"  # a library's caller is not to be run again
    try:
        return pl.Trainer(
            accelerator=settings.accelerator,
            devices=devices if devices == "auto" else int(devices),
            strategy=strategy,
            num_nodes=settings.num_nodes,
            plugins=[environment] if environment else None,
            precision="32-true",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=settings.progress,
            use_distributed_sampler=False,
        )
    except MISFIT as error:
        raise UserError(f"these devices cannot be used: {' '.join(str(error).split())}") from error


def _reported(error: ProcessRaisedException) -> Exception:
    """Return the user's error that ended another process, or the error itself."""
    marker = f"{UserError.__module__}.{UserError.__name__}: "
    lines = [line for line in str(error).splitlines() if line.startswith(marker)]
    return UserError(lines[-1].removeprefix(marker)) if lines else error
