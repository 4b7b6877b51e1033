"""``pbe evaluate``: score a model, or finished edits of any system."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pbe.cli.arguments import Count, Dtype, Model, Natural, Several, options
from pbe.errors import UserError
from pbe.files import expand_home
from pbe.resources import packaged

if TYPE_CHECKING:
    import torch

    from pbe.editing.pipeline import PaintByExample
    from pbe.evaluation.benchmark.generation import GenerateSettings

TOY_BATCH = 32


@options
class Source:
    """What is scored, and where the scores go."""

    model: Model | None = field(default=None, metadata={"group": "What is scored"})
    """model to evaluate, in any layout"""
    raw_weights: bool = False
    """use the plain weights of a training checkpoint, not their moving average"""
    benchmark: Path | None = None
    """benchmark folder (pbe benchmark build); without one, objects of the toy world are edited"""
    edits: Several = field(default_factory=list)
    """[NAME=]DIR: folders of finished edits, <id>.png, instead of a model or beside it"""
    out: Path
    """folder for scores, tables and images"""


@options
class Sampling:
    """How a model's edits are made."""

    guidance: list[float] | None = field(default=None, metadata={"group": "How edits are made"})
    """guidance scales (default 5; without --benchmark 1 2 3 5)"""
    solver: str | None = None
    """solver (default plms; lcm for a few-step model)"""
    steps: int | None = None
    """steps of the solver (default 50, or what a few-step model is meant for)"""
    seed: int = 0
    """seed of noise, intervals and toy benchmark"""
    batch_size: int | None = None
    """edits at a time (default 8; without --benchmark 32)"""
    dtype: Dtype = "fp32"
    """type of the weights"""
    device: str = ""
    """auto, cpu, cuda, ... (default auto; without --benchmark cpu)"""
    threads: Natural | None = None
    """CPU threads per process (default 1; without --benchmark all)"""


@options
class Generating:
    """How a model edits a benchmark's cases."""

    preserve_background: bool = field(
        default=True, metadata={"group": "With --benchmark: how its cases are edited"}
    )
    """keep every pixel outside the mask; the paper's scores do not"""
    conventions: Literal["original", "diffusers"] | None = None
    """prepare the inputs as the original code or as diffusers does (default: the model's)"""
    edits_only: bool = False
    """write the model's edits into --out and score nothing"""
    devices: str = "auto"
    """number of GPUs, or of processes on the CPU"""
    strategy: str = "auto"
    """Lightning's strategy for several devices"""
    num_nodes: int = 1
    """number of machines, started by torchrun or SLURM"""
    engine: Literal["local", "ray"] = "local"
    """run processes here, or tasks on a Ray cluster whose nodes see the same files"""


@options
class Scoring:
    """How a benchmark's edits are scored."""

    cases: Natural = field(default=0, metadata={"group": "With --benchmark: how they are scored"})
    """use only this many cases, the first ones (0: all)"""
    metrics: list[str] = field(default_factory=list)
    """scores to make (default: all)"""
    reference: Path | None = None
    """folder of real images for FID and similar scores (default: the cases' own)"""
    tower_weights: list[str] = field(default_factory=list)
    """TOWER=FILE: weights for the scores that need clip, dino, inception or lpips"""
    towers: list[str] = field(default_factory=list)
    """TOWER=NAME: another architecture for clip or dino"""
    mixture: Path | None = None
    """Gaussian mixture for QS, from pbe fit"""
    rank_by: str = ""
    """score by which the best and worst edits are chosen"""
    show: Count = 8
    """number of best, of worst and of random edits on the page"""


@options
class Toy:
    """How the toy world's objects are edited."""

    objects: int = field(default=0, metadata={"group": "Without --benchmark: the toy world"})
    """use only this many test objects (0: all)"""
    sheet: Count = 48
    """number of cases on the contact sheet"""
    world: Path = field(default_factory=lambda: packaged("data/toy/toy_world.zip"))
    """archive of the toy world's objects and panoramas"""


@options
class EvaluateSettings:
    """Options of ``pbe evaluate``."""

    source: Source
    sampling: Sampling = Sampling()
    generating: Generating = Generating()
    scoring: Scoring = Scoring()
    toy: Toy = Toy()


def evaluate(*, settings: EvaluateSettings) -> None:
    """Score a model, or finished edits of any system, on a benchmark folder or on the toy world.

    pbe evaluate --model toy --out outputs/evaluation
    pbe evaluate --model outputs/paper/model --benchmark data/test_bench --out outputs/coco_ee
    pbe evaluate --model outputs/paper/model --edits theirs=results/theirs others=results/others
    --benchmark data/test_bench --out outputs/comparison
    """
    check(settings)
    if settings.source.benchmark:
        run_benchmark(settings)
    else:
        run_toy(settings)


def check(settings: EvaluateSettings) -> None:
    """Check that the options fit together."""
    source, benchmark = settings.source, settings.source.benchmark is not None
    if not (source.model or source.edits):
        raise UserError("give --model, or --edits with a folder of finished edits, or both")
    if source.edits and not benchmark:
        raise UserError("--edits needs --benchmark, the folder of the cases that were edited")
    for_models = [name for name in _given(settings.sampling) if name not in ("seed", "device")]
    for_models += _given(settings.generating) + (["raw_weights"] if source.raw_weights else [])
    for names, used, why in (
        (_given(settings.toy), not benchmark, "is for the toy world: leave it out with --benchmark"),
        (_given(settings.generating) + _given(settings.scoring), benchmark, "needs --benchmark"),
        (for_models, bool(source.model), "is for models: finished edits are scored as they are"),
    ):
        if names and not used:
            raise UserError(f"--{names[0].replace('_', '-')} {why}")


def _given(group: Sampling | Generating | Scoring | Toy) -> list[str]:
    """Return the options that do not have their default."""
    default = type(group)()
    names = [each.name for each in fields(group)]
    return [name for name in names if getattr(group, name) != getattr(default, name)]


def run_benchmark(settings: EvaluateSettings) -> None:
    """Generate or take edits of a benchmark's folder, score them and write."""
    source, scoring, seed = settings.source, settings.scoring, settings.sampling.seed
    assert source.benchmark is not None
    generating = generate_settings(settings)
    if settings.generating.edits_only:
        edit_benchmark(settings, generating)
        return
    from pbe.editing.batch.runner import pick_device
    from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
    from pbe.evaluation.benchmark.page import PageSettings
    from pbe.evaluation.benchmark.run import BenchmarkRun
    from pbe.evaluation.benchmark.toy import GUIDANCE
    from pbe.evaluation.metrics.bootstrap import Bootstrap
    from pbe.evaluation.metrics.scoring import ScoreSettings

    score_settings = ScoreSettings(
        tuple(scoring.metrics),
        bootstrap=Bootstrap(seed=seed),
        weights=parse_pairs(scoring.tower_weights, "--tower-weights"),
        architectures=parse_pairs(scoring.towers, "--towers"),
        mixture=scoring.mixture,
        device=str(pick_device(settings.sampling.device or "auto")),
    )
    page = PageSettings(scoring.show, scoring.rank_by, seed)
    benchmark = BenchmarkFolder(source.benchmark, scoring.cases)
    work = BenchmarkRun(benchmark, source.out, score_settings, scoring.reference, page)
    for text in source.edits:
        work.take(*parse_edits(text))
    work.check()
    if source.model and not work.generate(
        source.model, settings.sampling.guidance or [GUIDANCE[-1]], generating
    ):
        return  # another process of several, whose first one scores
    work.score()
    print(f"\n{work.write()}")
    spent = work.seconds
    times = f"generated in {spent['generate']:.1f} s, scored in {spent['score']:.1f} s"
    print(f"{times}: {source.out}/index.html")


def edit_benchmark(settings: EvaluateSettings, generating: GenerateSettings) -> None:
    """Generate a benchmark's edits into the folder itself, to be scored elsewhere with ``--edits``."""
    from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
    from pbe.evaluation.benchmark.generation import generate
    from pbe.evaluation.benchmark.toy import GUIDANCE

    source, scales = settings.source, settings.sampling.guidance or [GUIDANCE[-1]]
    if source.edits or len(scales) > 1:
        raise UserError("--edits-only takes one --guidance and no --edits")
    assert source.model is not None
    assert source.benchmark is not None
    benchmark = BenchmarkFolder(source.benchmark, settings.scoring.cases)
    generate(source.model, benchmark, source.out, replace(generating, guidance_scale=scales[0]))


def parse_edits(text: str) -> tuple[Path, str]:
    """Read ``NAME=DIR``, or a folder that its own name is taken from; return folder and name."""
    name, separator, folder = text.partition("=")
    if not separator or Path(text).is_dir():
        return Path(text), Path(text).resolve().name
    if not name.strip() or not folder:
        raise UserError(f"--edits takes a folder or NAME=DIR, not '{text}'")
    return Path(folder), name.strip()


def parse_pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Read the ``tower=value`` pairs of a flag."""
    pairs: dict[str, str] = {}
    for text in texts:
        tower, _, value = text.partition("=")
        if not tower or not value:
            raise UserError(f"{flag} takes tower=value, such as clip=openai, not '{text}'")
        if tower in pairs:
            raise UserError(f"{flag} names '{tower}' twice")
        pairs[tower] = expand_home(value)
    return pairs


def generate_settings(settings: EvaluateSettings) -> GenerateSettings:
    """Return how a benchmark is edited."""
    sampling, generating = settings.sampling, settings.generating
    device = sampling.device or "auto"
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"with --benchmark, --device is auto, cpu or cuda, not '{device}'; see --devices")
    from pbe.evaluation.benchmark.generation import GenerateSettings

    return GenerateSettings(
        solver=sampling.solver,
        steps=sampling.steps,
        seed=sampling.seed,
        batch_size=GenerateSettings().batch_size if sampling.batch_size is None else sampling.batch_size,
        dtype=sampling.dtype,
        preserve_background=generating.preserve_background,
        conventions=generating.conventions,
        raw_weights=settings.source.raw_weights,
        threads=sampling.threads or 1,
        accelerator={"cuda": "gpu"}.get(device, device),
        devices=generating.devices,
        strategy=generating.strategy,
        num_nodes=generating.num_nodes,
        engine=generating.engine,
    )


def run_toy(settings: EvaluateSettings) -> None:
    """Edit, score and write on the toy world's objects."""
    source, sampling, toy = settings.source, settings.sampling, settings.toy
    import torch
    from tqdm import tqdm

    from pbe.data.toy.scenes import ToyWorld
    from pbe.editing.batch.runner import pick_device
    from pbe.evaluation.benchmark.generation import GenerateSettings, at_scales
    from pbe.evaluation.benchmark.toy import GUIDANCE, make_benchmark, make_edits
    from pbe.evaluation.benchmark.toy_run import score_edits
    from pbe.evaluation.metrics.towers import load_tower
    from pbe.files import make_folder

    if sampling.threads:
        torch.set_num_threads(sampling.threads)
    scales = GUIDANCE if sampling.guidance is None else sampling.guidance
    edit_settings = GenerateSettings(
        solver=sampling.solver,
        steps=sampling.steps,
        seed=sampling.seed,
        batch_size=TOY_BATCH if sampling.batch_size is None else sampling.batch_size,
    )
    at_scales(edit_settings, scales)  # checks them
    device = pick_device(sampling.device or "cpu")
    pipe = load_pipeline(source, sampling.dtype, device)
    edit_settings = edit_settings.completed(pipe.model.config)
    make_folder(source.out)
    tower = load_tower("lite2", None, None)
    config = pipe.model.config
    cases = make_benchmark(
        ToyWorld(toy.world),
        seed=sampling.seed,
        image_size=config.image_size,
        exemplar_size=config.exemplar_encoder.image_size,
        objects=toy.objects,
    )
    started = time.perf_counter()
    with tqdm(total=2 * len(scales) * len(cases), unit="edit", desc="edit") as bar:
        edits = make_edits(pipe, cases, scales, edit_settings, lambda done, _: bar.update(done - bar.n))
    edited = time.perf_counter()
    scores = score_edits(cases, edits, tower, seed=sampling.seed)
    seconds = {"edit": round(edited - started, 2), "score": round(time.perf_counter() - edited, 2)}
    used = {
        "solver": edit_settings.solver,
        "steps": edit_settings.steps,
        "seed": edit_settings.seed,
        "dtype": sampling.dtype,
        "device": str(device),
        "batch_size": edit_settings.batch_size,
        "threads": torch.get_num_threads(),
    }
    head = {
        "benchmark": {"name": "toy", "seed": sampling.seed, "image_size": config.image_size},
        "model": source.model,
        "sampling": used,
        "seconds": seconds,
    }
    write_toy(settings, cases, edits, scores, head)


def load_pipeline(source: Source, dtype: str, device: torch.device) -> PaintByExample:
    """Load the model whose edits of the toy world's objects are scored."""
    from pbe.checkpoints.tensors import DTYPES
    from pbe.editing.pipeline import PaintByExample

    assert source.model is not None
    pipe = PaintByExample.from_pretrained(
        source.model, device=device, dtype=DTYPES[dtype], raw_weights=source.raw_weights
    )
    pipe.set_progress_bar_config(disable=True)  # the edits have a bar of their own
    return pipe


def write_toy(settings: EvaluateSettings, cases: Any, edits: Any, scores: Any, head: dict[str, Any]) -> None:
    """Write scores, table and sheet, and print the table."""
    from PIL import Image

    from pbe.editing.batch.records import write_image, write_json
    from pbe.evaluation.report import markdown, sheet
    from pbe.files import write_output

    out, seconds, table = settings.source.out, head["seconds"], markdown(scores.table())
    write_json(out / "scores.json", {**head, **scores.to_dict()})
    write_output(out / "scores.md", table)
    rows = {label: images[: settings.toy.sheet] for label, images in edits.rows(cases).items()}
    write_image(out / "grid.png", Image.fromarray(sheet(rows)))
    print(f"\n{table}\nedited in {seconds['edit']} s, scored in {seconds['score']} s: {out}")
