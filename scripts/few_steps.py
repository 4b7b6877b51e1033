"""Table and strip of docs/few_steps.md: a student at several numbers of steps, beside its teacher.

python scripts/few_steps.py                                        # all 181 objects of the toy benchmark
python scripts/few_steps.py --student MODEL --others NAME=MODEL    # others at the steps they are meant for
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.data.toy.scenes import ToyWorld
from pbe.editing.pipeline import PaintByExample
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.evaluation.benchmark.toy import edit_cases, make_benchmark
from pbe.evaluation.benchmark.toy_run import Scorer, changed_outside, edit_sizes
from pbe.evaluation.metrics.bootstrap import derangement
from pbe.evaluation.metrics.towers import load_tower
from pbe.evaluation.report import Table, markdown, sheet
from pbe.resources import find_model

SHOWN = 12  # cases of the strip, the first ones
HEAD = ["edit", "calls", "ms an edit", "AUC", "AUC, grey", "first of 20", "first of 20, grey", "similarity"]


def main(arguments: list[str] | None = None) -> int:
    """Edit, score, print the table and write the strip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", default="toy")
    parser.add_argument("--student", default="toy-fast")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--others", nargs="*", default=[], metavar="NAME=MODEL")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--objects", type=int, default=0, help="0 means all")
    parser.add_argument("--out", type=Path, default=Path("docs/images/few_steps.jpg"))
    options = parser.parse_args(arguments)
    named = [(f"student, {steps} step{'s' * (steps > 1)}", options.student, steps) for steps in options.steps]
    others = [(*each.split("=", 1), None) for each in options.others]
    systems = [("teacher, 50 PLMS steps", options.teacher, None), *named, *others]

    common = GenerateSettings(guidance_scale=options.guidance, batch_size=32)
    size, exemplar_size = edit_sizes(load(options.teacher).model.config)
    cases = make_benchmark(
        ToyWorld(), seed=0, image_size=size, exemplar_size=exemplar_size, objects=options.objects
    )
    scorer = Scorer(cases, load_tower("lite2", None, None))
    shuffled = [cases[place].exemplar for place in derangement(len(cases), 0, "partner")]
    rows, outside = [], 0
    strip = {"masked": [case.masked for case in cases], "exemplar": [case.exemplar for case in cases]}
    for name, model, steps in systems:
        pipe = load(model)
        settings = replace(common, steps=steps).completed(pipe.model.config)
        assert settings.steps is not None
        started = time.perf_counter()
        edits = edit_cases(pipe, cases, settings)
        seconds = (time.perf_counter() - started) / len(cases)
        negative = scorer.similarity(scorer.regions(edit_cases(pipe, cases, settings, shuffled)))
        row = scorer.row(scorer.regions(edits), negative)
        calls = settings.steps if pipe.model.config.unet.guidance_range else 2 * (settings.steps + 1)
        auc, grey_auc, first, grey_first, _, similarity, *_ = row.cells()
        scores = [auc, grey_auc, first, grey_first, similarity]
        rows.append([name, f"{calls}", f"{1000 * seconds:.0f}", *scores])
        outside = max(outside, changed_outside(np.stack([case.image for case in cases]), scorer.masks, edits))
        strip[name] = list(edits)
    note = f"{len(cases)} objects, guidance {options.guidance:g}; largest change outside the mask: {outside}."
    print(markdown(Table(HEAD, rows, note)))
    strip["hidden"] = [case.image for case in cases]
    shown = {name: images[:SHOWN] for name, images in strip.items()}
    Image.fromarray(sheet(shown, tile=128, columns=SHOWN)).save(options.out, quality=88)
    return 0


def load(model: str) -> PaintByExample:
    """Load a model by name or path."""
    pipe = PaintByExample.from_pretrained(find_model(model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    raise SystemExit(main())
