"""What fine-tuning on a few images of one object gains, and what the model forgets: on the toy world.

python scripts/finetune_objects.py --objects 3 --images 5

Each object is one that the toy model has not seen. It is rendered into a few scenes, adapters are trained on
them with ``configs/object.yaml``, with and without ordinary samples beside them, and the object is then
painted into other scenes from other exemplars. A score is the cosine of what was painted with the object that
was there before, and with its exemplar, both by features of a tower that no training has seen; other unseen
objects tell what was forgotten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pbe.cli.main import run_command
from pbe.config import load_config
from pbe.data.randomness import permutation
from pbe.data.shards.archive import ShardRecord, write_shards
from pbe.data.toy.render import SceneRenderer, render_records
from pbe.data.toy.scenes import DEFAULT_WORLD, SceneConfig, ToyObject, ToyWorld
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.evaluation.benchmark.toy import EXEMPLAR_SIZE, IMAGE_SIZE, SPLIT, ToyCase, edit_cases, make_case
from pbe.evaluation.metrics.bootstrap import Estimate, cosine, mean_interval
from pbe.evaluation.metrics.towers import Tower, load_tower, region
from pbe.training.run import train

FIRST_SEED = 1000  # of cases that the benchmark does not have
KINDS = {"adapters, half ordinary samples": 0.5, "adapters, the object alone": 0.0}


class OneObject(ToyWorld):
    """A toy world of a single object, before the panoramas that training scenes have."""

    def __init__(self, toy: ToyObject) -> None:
        super().__init__()
        self.toy = toy

    def objects(self, split: str) -> list[ToyObject]:
        """Return the object, whatever the split."""
        return [self.toy]


@dataclass(frozen=True)
class Similarity:
    """Cosines of each painted region with the object that was there, and with the exemplar, ``(n,)`` each."""

    true: np.ndarray
    exemplar: np.ndarray


def few_images(toy: ToyObject, count: int, seed: int) -> Iterator[ShardRecord]:
    """Render an object into so many scenes; nothing else stands in them."""
    renderer = SceneRenderer(DEFAULT_WORLD, "train", seed, SceneConfig(max_objects=1, recolour=0.0))
    renderer.world = OneObject(toy)
    yield from map(renderer.record, range(count))


def measure(pipe: PaintByExample, cases: list[ToyCase], tower: Tower) -> Similarity:
    """Edit cases and compare what was painted."""
    settings = GenerateSettings(solver="ddim", steps=20, batch_size=16, progress=False)
    edits = edit_cases(pipe, cases, settings)
    regions = [[region(image, case.mask) for image, case in zip(images, cases, strict=True)]
               for images in (edits, [case.image for case in cases])]  # fmt: skip
    painted, true = (tower.squashed(images) for images in regions)
    shown = tower.squashed([case.exemplar for case in cases])
    return Similarity(cosine(painted, true), cosine(painted, shown))


def adapt(options: argparse.Namespace, folder: Path, share: float) -> Path:
    """Train adapters on the shards of an object; returns their file."""
    overrides = [
        f"init_from={options.model}", f"output_dir={folder / f'run-{share:g}'}",
        f"data.train_shards={folder / 'shards'}", f"data.prior_share={share}", "data.num_workers=0",
        f"data.prior_shards={options.out / 'ordinary' if share else ''}",
        "trainer.progress=false", "trainer.accelerator=cpu", "logging.loggers=[csv]",
        *options.overrides,
    ]  # fmt: skip
    return train(load_config("object", overrides)).model_dir


def loaded(model: str, adapter: Path | None = None) -> PaintByExample:
    """Return a pipeline, with an adapter or without."""
    pipe = PaintByExample.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_adapter(adapter)
    return pipe


def run(options: argparse.Namespace) -> dict[str, list[tuple[Similarity, Similarity]]]:
    """Return for each kind and object the similarities of its own cases and of the other objects'."""
    world, tower = ToyWorld(), load_tower("lite2", None, None)
    toys = world.objects(SPLIT)
    order = [int(i) for i in permutation(len(toys), options.seed, "finetuned")]
    chosen, rest = order[: options.objects], order[options.objects :][: options.others]
    others = [make_case(world, index, 0, IMAGE_SIZE, EXEMPLAR_SIZE) for index in rest]
    scenes = render_records(DEFAULT_WORLD, "train", 7, options.ordinary, SceneConfig(max_objects=1), 0)
    write_shards(scenes, options.out / "ordinary")
    base = loaded(options.model)
    before = measure(base, others, tower)
    found: dict[str, list[tuple[Similarity, Similarity]]] = {"before": [], **{kind: [] for kind in KINDS}}
    for index in chosen:
        folder = options.out / toys[index].key
        write_shards(few_images(toys[index], options.images, options.seed), folder / "shards")
        seeds = range(FIRST_SEED, FIRST_SEED + options.cases)
        cases = [make_case(world, index, seed, IMAGE_SIZE, EXEMPLAR_SIZE) for seed in seeds]
        found["before"].append((measure(base, cases, tower), before))
        for kind, share in KINDS.items():
            pipe = loaded(options.model, adapt(options, folder, share))
            found[kind].append((measure(pipe, cases, tower), measure(pipe, others, tower)))
            own, rest_now = found[kind][-1]
            gain = own.true.mean() - found["before"][-1][0].true.mean()
            lost = rest_now.true.mean() - before.true.mean()
            print(f"{toys[index].name}, {kind}: {gain:+.3f}; others {lost:+.3f}", flush=True)
    return found


def table(found: dict[str, list[tuple[Similarity, Similarity]]]) -> Iterator[str]:
    """Yield the rows of a table: means over objects and cases, and the gains over the model before."""
    yield "| model | the object: true | exemplar | other objects: true | exemplar |"
    yield "| --- | --- | --- | --- | --- |"
    for kind, pairs in found.items():
        cells = []
        for which in (0, 1):
            for name in ("true", "exemplar"):
                now, then = (
                    np.concatenate([getattr(pair[which], name) for pair in each])
                    for each in (pairs, found["before"])
                )
                gain: Estimate = mean_interval(now - then)
                cells.append(f"{now.mean():.3f}" + ("" if kind == "before" else f", {gain}"))
        yield f"| {kind} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value, changes to configs/object.yaml")
    parser.add_argument("--out", type=Path, default=Path("outputs/finetune-objects"))
    parser.add_argument("--model", default="toy")
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--images", type=int, default=5, help="of each object")
    parser.add_argument("--cases", type=int, default=16, help="edits of each object")
    parser.add_argument("--others", type=int, default=40, help="other objects, an edit each")
    parser.add_argument("--ordinary", type=int, default=500, help="scenes that are mixed in")
    parser.add_argument("--seed", type=int, default=0)

    def body() -> None:
        options = parser.parse_args(arguments)
        if min(options.objects, options.images, options.cases, options.others, options.ordinary) < 1:
            raise UserError("all counts must be at least 1")
        print("\n".join(table(run(options))))

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
