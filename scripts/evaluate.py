r"""Score a model, or finished edits of any system, on a benchmark; without one, on the toy world's objects.

python scripts/evaluate.py --model data/toy/model --out outputs/evaluation
python scripts/evaluate.py --model outputs/paper/model --benchmark data/test_bench --out outputs/coco_ee
python scripts/evaluate.py --model outputs/paper/model --edits theirs=results/theirs others=results/others \
        --benchmark data/test_bench --out outputs/comparison
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from pbe.checkpoints.precision import DTYPES, torch_dtype
from pbe.cli.parser import Parser, run_command
from pbe.data.toy.scenes import DEFAULT_WORLD, ToyWorld
from pbe.editing.batch.records import write_json, write_picture
from pbe.editing.batch.runner import pick_device
from pbe.editing.conventions import CONVENTIONS
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.cases import BenchmarkFolder
from pbe.evaluation.benchmark.generation import GenerateSettings, generate
from pbe.evaluation.benchmark.run import BenchmarkRun, PageSettings
from pbe.evaluation.benchmark.sheets import benchmark_rows, sheet
from pbe.evaluation.benchmark.toy import make_benchmark
from pbe.evaluation.benchmark.toy_edits import GUIDANCE, EditSettings, make_edits
from pbe.evaluation.benchmark.toy_scores import markdown_table, score_edits
from pbe.evaluation.metrics.features import LiteFeatures
from pbe.evaluation.metrics.results import Bootstrap
from pbe.evaluation.metrics.scoring import ScoreSettings
from pbe.files import expand_home, make_folder, write_output

TOY_BATCH = 32
# Options that only one way of evaluating reads; elsewhere they would say something that is not so.
GENERATING = ("preserve_background", "conventions", "edits_only", "devices", "strategy", "num_nodes")
FOR_MODELS = ("raw_weights", "guidance", "solver", "steps", "batch_size", "dtype", "threads", *GENERATING)
SCORING = ("cases", "metrics", "reference", "tower_weights", "towers", "mixture", "rank_by", "show")
FOR_BENCHMARKS = ("edits", *GENERATING, *SCORING)
FOR_TOYS = ("objects", "sheet", "world")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "--model", type=expand_home, metavar="PATH", help="model in any layout, whose edits are generated"
    )
    what.add_argument(
        "--raw-weights", action="store_true", help="the plain weights of a training, not the average"
    )
    what.add_argument("--benchmark", type=Path, metavar="DIR", help="folder in COCOEE's layout")
    what.add_argument(
        "--edits",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]DIR",
        help="finished edits <id>.png, one set or more, instead of a model or beside it",
    )
    what.add_argument("--out", type=Path, required=True, help="folder for scores, tables and pictures")
    edit = parser.add_argument_group("how edits are made")
    edit.add_argument(
        "--guidance", type=float, nargs="+", help="guidance scales (default 5; without --benchmark 1 2 3 5)"
    )
    edit.add_argument("--solver", default="plms", help="see docs/solvers.md (default %(default)s)")
    edit.add_argument("--steps", type=int, default=50, help="of the solver (default %(default)s)")
    edit.add_argument("--seed", type=int, default=0, help="of noise, intervals and toy benchmark")
    edit.add_argument("--batch-size", type=int, help="edits at a time (default 8; without --benchmark 32)")
    edit.add_argument(
        "--dtype", choices=list(DTYPES), default="fp32", help="of the weights (default %(default)s)"
    )
    edit.add_argument("--device", help="auto, cpu, cuda, ... (default auto; without --benchmark cpu)")
    edit.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default 1 a process; without --benchmark all)"
    )
    _add_benchmark(parser.add_argument_group("with --benchmark"))
    toy = parser.add_argument_group("without --benchmark: the toy world")
    toy.add_argument("--objects", type=int, default=0, help="test objects to use; 0 means all of them")
    toy.add_argument("--sheet", type=int, default=48, help="cases on the picture sheet, the first ones")
    toy.add_argument("--world", type=Path, default=DEFAULT_WORLD, help="archive of objects and panoramas")
    return parser


def _add_benchmark(bench: argparse._ArgumentGroup) -> None:
    bench.add_argument("--cases", type=int, default=0, metavar="N", help="the first N only")
    bench.add_argument(
        "--preserve-background",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep every pixel outside the mask; the paper's scores are without (default: on)",
    )
    bench.add_argument(
        "--conventions", choices=list(CONVENTIONS), help="of preparing the inputs (default: the model's)"
    )
    bench.add_argument(
        "--edits-only",
        action="store_true",
        help="write a model's edits straight into --out, and score nothing",
    )
    bench.add_argument("--devices", default="auto", help="how many GPUs, or processes on the CPU")
    bench.add_argument("--strategy", default="auto", help="Lightning's (default %(default)s)")
    bench.add_argument("--num-nodes", type=int, default=1, help="machines, started by torchrun or SLURM")
    bench.add_argument("--metrics", nargs="+", default=[], help="scores to make (default: all)")
    bench.add_argument("--reference", type=Path, metavar="DIR", help="real pictures for FID and its kind")
    bench.add_argument(
        "--tower-weights", nargs="+", default=[], metavar="TOWER=FILE", help="of clip, dino, inception, lpips"
    )
    bench.add_argument(
        "--towers", nargs="+", default=[], metavar="TOWER=NAME", help="other architectures than the usual"
    )
    bench.add_argument("--mixture", type=Path, metavar="FILE", help="of QS, from scripts/fit_mixture.py")
    bench.add_argument("--rank-by", default="", metavar="SCORE", help="what best and worst edits are by")
    bench.add_argument("--show", type=int, default=8, help="best, worst and random edits on the page, each")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``.

    Raises:
        UserError: options do not fit together.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not (options.model or options.edits):
        raise UserError("give --model, or --edits with a folder of finished edits, or both")
    if options.edits and not options.benchmark:
        raise UserError("--edits needs --benchmark, the folder of the cases that were edited")
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    for names, used, why in (
        (FOR_TOYS, not options.benchmark, "is for the toy world: leave it out with --benchmark"),
        (FOR_BENCHMARKS, bool(options.benchmark), "needs --benchmark"),
        (FOR_MODELS, bool(options.model), "is for models: finished edits are scored as they are"),
    ):
        for name in names:
            if name in given and not used:
                raise UserError(f"--{name.replace('_', '-')} {why}")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Score what is asked for, and write; return what scores.json holds, or nothing in other processes.

    Raises:
        UserError: options cannot be used.
    """
    return run_benchmark(options) if options.benchmark else run_toy(options)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Generate or take edits of a benchmark's folder, score them and write."""
    if min(options.threads, options.cases) < 0 or options.show < 1:
        raise UserError("--threads and --cases must be 0 or more, --show at least 1")
    generating = _generate_settings(options)
    if options.edits_only:
        return edit_benchmark(options, generating)
    settings = ScoreSettings(
        tuple(options.metrics),
        bootstrap=Bootstrap(seed=options.seed),
        weights=parse_pairs(options.tower_weights, "--tower-weights"),
        architectures=parse_pairs(options.towers, "--towers"),
        mixture=options.mixture,
        device=str(pick_device(options.device or "auto")),
    )
    page = PageSettings(options.show, options.rank_by, options.seed)
    benchmark = BenchmarkFolder(options.benchmark, options.cases)
    work = BenchmarkRun(benchmark, options.out, settings, options.reference, page)
    for text in options.edits:
        work.take(*parse_edits(text))
    work.check()
    if options.model and not work.generate(options.model, options.guidance or [GUIDANCE[-1]], generating):
        return {}
    work.score()
    print(f"\n{work.write()}")
    spent = work.seconds
    print(f"generated in {spent.generate:.1f} s, scored in {spent.score:.1f} s: {options.out}/index.html")
    return work.to_dict()


def edit_benchmark(options: argparse.Namespace, settings: GenerateSettings) -> dict[str, Any]:
    """Generate a benchmark's edits into the folder itself, to be scored elsewhere with ``--edits``."""
    scales = options.guidance or [GUIDANCE[-1]]
    if options.edits or len(scales) > 1:
        raise UserError("--edits-only takes one --guidance and no --edits")
    settings = replace(settings, guidance_scale=scales[0])
    generate(options.model, BenchmarkFolder(options.benchmark, options.cases), options.out, settings)
    return {}


def parse_edits(text: str) -> tuple[Path, str]:
    """Read ``NAME=DIR``, or a folder that its own name is taken from; return folder and name.

    Raises:
        UserError: the name or the folder is empty.
    """
    name, separator, folder = text.partition("=")
    if not separator or Path(text).is_dir():
        return Path(text), Path(text).resolve().name
    if not name.strip() or not folder:
        raise UserError(f"--edits takes a folder or NAME=DIR, not '{text}'")
    return Path(folder), name.strip()


def parse_pairs(texts: list[str], flag: str) -> dict[str, str]:
    """Read the ``tower=value`` pairs of a flag.

    Raises:
        UserError: a text of another form, or a tower twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        tower, _, value = text.partition("=")
        if not tower or not value:
            raise UserError(f"{flag} takes tower=value, such as clip=openai, not '{text}'")
        if tower in pairs:
            raise UserError(f"{flag} names '{tower}' twice")
        pairs[tower] = expand_home(value)
    return pairs


def _generate_settings(options: argparse.Namespace) -> GenerateSettings:
    device = options.device or "auto"
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"with --benchmark, --device is auto, cpu or cuda, not '{device}'; see --devices")
    return GenerateSettings(
        solver=options.solver,
        steps=options.steps,
        seed=options.seed,
        batch_size=GenerateSettings().batch_size if options.batch_size is None else options.batch_size,
        dtype=options.dtype,
        preserve_background=options.preserve_background,
        conventions=options.conventions,
        raw_weights=options.raw_weights,
        threads=options.threads or 1,
        accelerator={"cuda": "gpu"}.get(device, device),
        devices=options.devices,
        strategy=options.strategy,
        num_nodes=options.num_nodes,
    )


def run_toy(options: argparse.Namespace) -> dict[str, Any]:
    """Edit, score and write on the toy world's objects; return what scores.json holds.

    Raises:
        UserError: an option, the model or the archive cannot be used, or the folder not be written to.
    """
    if options.threads < 0 or options.sheet < 1:
        raise UserError("--threads must be 0 or more, --sheet at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = EditSettings(
        GUIDANCE if options.guidance is None else tuple(options.guidance),
        options.solver,
        options.steps,
        options.seed,
        TOY_BATCH if options.batch_size is None else options.batch_size,
    )
    device = pick_device(options.device or "cpu")
    pipe = PaintByExample.from_pretrained(
        options.model, device=device, dtype=torch_dtype(options.dtype), raw_weights=options.raw_weights
    )
    pipe.set_progress_bar_config(disable=True)  # the edits have a bar of their own
    make_folder(options.out)
    features = LiteFeatures()
    config = pipe.model.config
    cases = make_benchmark(
        ToyWorld(options.world),
        seed=options.seed,
        image_size=config.image_size,
        exemplar_size=config.exemplar_encoder.image_size,
        objects=options.objects,
    )
    started = time.perf_counter()
    with tqdm(total=2 * len(settings.guidance) * len(cases), unit="edit", desc="edit") as bar:
        edits = make_edits(pipe, cases, settings, lambda done, _total: bar.update(done - bar.n))
    edited = time.perf_counter()
    scores = score_edits(cases, edits, features, seed=options.seed)
    seconds = {"edit": round(edited - started, 2), "score": round(time.perf_counter() - edited, 2)}
    report = {
        "benchmark": {"name": "toy", "seed": options.seed, "image_size": config.image_size},
        "model": options.model,
        "sampling": {
            "solver": settings.solver,
            "steps": settings.steps,
            "seed": settings.seed,
            "dtype": options.dtype,
            "device": str(device),
            "batch_size": settings.batch_size,
            "threads": torch.get_num_threads(),
        },
        "seconds": seconds,
        **scores.to_dict(),
    }
    table = markdown_table(scores)
    write_json(options.out / "scores.json", report)
    write_output(options.out / "scores.md", table)
    shown = {label: pictures[: options.sheet] for label, pictures in benchmark_rows(cases, edits).items()}
    write_picture(options.out / "grid.png", Image.fromarray(sheet(shown)))
    print(f"\n{table}\nedited in {seconds['edit']} s, scored in {seconds['score']} s: {options.out}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
