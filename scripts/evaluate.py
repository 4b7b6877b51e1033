"""Score a model on the toy benchmark: edits of every test object into unseen scenes, scored and drawn.

python scripts/evaluate.py --model data/toy/model --out outputs/evaluation
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from pbe.checkpoints.precision import DTYPES, torch_dtype
from pbe.cli import Parser, run_command
from pbe.data.toy_world import DEFAULT_WORLD, ToyWorld
from pbe.editing.pipeline import PaintByExample
from pbe.editing.runner import pick_device
from pbe.errors import UserError
from pbe.evaluation.benchmark import make_benchmark
from pbe.evaluation.edits import GUIDANCE, EditSettings, make_edits
from pbe.evaluation.features import LiteFeatures
from pbe.evaluation.scores import markdown_table, score_edits
from pbe.evaluation.sheets import benchmark_rows, sheet
from pbe.files import make_folder


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="model folder (config.json and safetensors)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for scores.json, scores.md and grid.png"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=list(GUIDANCE), help="guidance scales")
    parser.add_argument("--solver", default="plms", help="see docs/solvers.md (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of the solver (default %(default)s)")
    parser.add_argument("--objects", type=int, default=0, help="test objects to use; 0 means all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the benchmark and of the noise")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="edits at a time; changes no result but speed"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, ... (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="fp32", help="of the weights (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 means one a core")
    parser.add_argument("--sheet", type=int, default=48, help="cases on the picture sheet, the first ones")
    parser.add_argument("--world", type=Path, default=DEFAULT_WORLD, help="archive of objects and panoramas")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Edit, score and write; return what scores.json holds.

    Raises:
        UserError: an option, the model or the archive cannot be used, or the folder not be written to.
    """
    if options.threads < 0 or options.sheet < 1:
        raise UserError("--threads must be 0 or more, --sheet at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = EditSettings(
        tuple(options.guidance), options.solver, options.steps, options.seed, options.batch_size
    )
    device = pick_device(options.device)
    pipe = PaintByExample.from_pretrained(options.model, device=device, dtype=torch_dtype(options.dtype))
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
        "model": str(options.model),
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
    (options.out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "scores.md").write_text(table)
    shown = {label: pictures[: options.sheet] for label, pictures in benchmark_rows(cases, edits).items()}
    Image.fromarray(sheet(shown)).save(options.out / "grid.png")
    print(f"\n{table}\nedited in {seconds['edit']} s, scored in {seconds['score']} s: {options.out}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
