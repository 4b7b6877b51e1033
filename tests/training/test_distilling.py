"""Whole runs of distillation: resumed, from a latent cache, by adapters, and what they leave behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pbe.checkpoints.adapters import open_adapter, with_adapters
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import load_model
from pbe.config import load_config
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.training.plan import make_plan
from pbe.training.run import train
from tests.training.test_finetuning import make_base
from tests.training.tiny import Watch, checkpoint, crash, differing, logged, run, send, tiny_config, weights

DISTIL = ("task=distillation", "distillation.steps=2", "distillation.teacher_steps=4", "model_from_init=true")
ADAPTERS = ("lora.rank=2", "lora.targets=[residual,feed_forward]", "distillation.guidance=[5,5]")


@pytest.fixture(scope="module")
def base(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_base(workshop, tmp_path_factory.mktemp("base"), 0)


@pytest.mark.parametrize("kind", ["trajectory", "consistency", "adapters"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(shards, base, tmp_path, kind: str):
    more = ADAPTERS if kind == "adapters" else (f"distillation.method={kind}",)
    settings = (base, *DISTIL, *more, "trainer.max_steps=7", "trainer.checkpoint_every=2")
    straight = run(tiny_config(shards, tmp_path / "straight", *settings))
    config = tiny_config(shards, tmp_path / "interrupted", *settings)
    assert run(config, Watch(3, crash)) is None
    assert run(config, Watch(5, send(signal.SIGTERM))).stopped_by == signal.SIGTERM
    finished = run(config)
    assert logged(tmp_path / "interrupted") == logged(tmp_path / "straight")
    read = load_file if kind == "adapters" else weights
    assert differing(read(straight.model_dir), read(finished.model_dir)) == []
    first, second = (checkpoint(tmp_path / name)["ema"] for name in ("straight", "interrupted"))
    assert differing(first, second) == []


def test_a_run_leaves_a_model_that_knows_its_steps(shards, base, tmp_path):
    more = ("logging.grid_every=3", "cache.folder=" + str(tmp_path / "cache"), "cache.variants=1")
    result = run(tiny_config(shards, tmp_path / "run", base, *DISTIL, *more))
    made = load_model(result.model_dir).config.unet
    assert (made.guidance_range, made.few_steps) == ([1.0, 8.0], 2)
    assert list((tmp_path / "run" / "grids").glob("*.png"))
    names = {name for _, name, _ in logged(tmp_path / "run")}
    assert {"train/loss", "train/loss_step2", "val/loss", "val/loss_step1"} <= names
    assert PaintByExample.from_pretrained(tmp_path / "run").solver == "lcm"


def test_one_adapter_makes_other_models_of_the_kind_fast(shards, workshop, base, tmp_path):
    result = run(tiny_config(shards, tmp_path / "run", base, *DISTIL, *ADAPTERS))
    file = open_adapter(result.model_dir)
    assert file.settings == {"few_steps": 2, "guidance_range": [5.0, 5.0]}
    make_base(workshop, tmp_path / "other", 1)
    other = with_adapters(open_checkpoint(tmp_path / "other"), [(file, 1.0)])
    assert other.config.unet.few_steps == 2
    pipe = PaintByExample.from_pretrained(tmp_path / "other")
    pipe.load_adapter(tmp_path / "run")
    assert pipe.solver == "lcm"


def test_a_run_goes_on_beside_its_own_teacher_only(shards, workshop, base, tmp_path):
    run(tiny_config(shards, tmp_path / "run", base, *DISTIL))
    other = make_base(workshop, tmp_path / "other", 1)
    with pytest.raises(UserError, match=r"the student of .* was trained beside other weights than those of"):
        train(tiny_config(shards, tmp_path / "run", other, *DISTIL, "trainer.max_steps=5"))


def test_the_configuration_that_a_run_leaves_goes_on_with_it(shards, base, tmp_path):
    """It has the student's sizes, and the teacher is read from the same ``init_from`` again."""
    config = tiny_config(shards, tmp_path / "run", base, *DISTIL, "model_from_init=false")
    first = run(config)
    left = load_config(tmp_path / "run" / "config.yaml", ["trainer.max_steps=5"])
    assert left.model.unet.few_steps == 2
    assert (first.steps, run(left).steps) == (3, 5)


def test_the_plan_is_told_beforehand(shards, base, tmp_path):
    lines = list(make_plan(tiny_config(shards, tmp_path / "run", base, *DISTIL)))
    assert any("teacher 0." in line for line in lines)
    assert any(line.startswith("speed:") for line in lines)
    assert not (tmp_path / "run").exists()
