"""Quick scores of a model: the same as the long way's, and nothing of the model or the run is changed."""

from __future__ import annotations

import copy
import csv
import dataclasses
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from pbe.checkpoints.native import save_model
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.evaluation.benchmark.toy import make_benchmark, make_edits
from pbe.evaluation.benchmark.toy_run import (
    QuickScorer,
    QuickSettings,
    ScoreCallback,
    quick_values,
    score_edits,
)
from pbe.evaluation.metrics.towers import Tower
from pbe.training.tasks.diffusion import DiffusionTask
from tests.commands import score as command

SETTINGS = QuickSettings(objects=20, guidance_scale=3.0, steps=1, batch_size=16, dtype="fp32")
NAMES = ["auc", "grey_auc", "first_of_20", "grey_first_of_20", "similarity"]


@pytest.fixture(scope="module")
def scorer(pipe: PaintByExample) -> QuickScorer:
    return QuickScorer(pipe.model.config, SETTINGS)


def test_the_row_is_that_of_the_whole_benchmark_cut_short(pipe, world, features: Tower, scorer):
    cases = make_benchmark(world, seed=0, image_size=32, exemplar_size=48, objects=20)
    settings = GenerateSettings(solver="ddim", steps=1, batch_size=16)
    expected = score_edits(cases, make_edits(pipe, cases, [3.0], settings), features).guidance[3.0]
    row = scorer.score(pipe.model)
    assert row == expected
    assert list(quick_values(row)) == NAMES
    assert quick_values(row)["grey_auc"] == expected.grey_auc.value


def test_a_model_in_training_is_left_as_it_is(pipe):
    scorer = QuickScorer(pipe.model.config, dataclasses.replace(SETTINGS, objects=2))
    model = copy.deepcopy(pipe.model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    scorer.score(model)
    assert torch.equal(torch.rand(3), expected)  # the run's own draws go on
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bfloat16_moves_the_scores_little(pipe):
    few = dataclasses.replace(SETTINGS, objects=4)
    exact, rough = (
        quick_values(QuickScorer(pipe.model.config, settings).score(pipe.model))
        for settings in (few, dataclasses.replace(few, dtype="bf16"))
    )
    assert rough["similarity"] == pytest.approx(exact["similarity"], abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": 182}, "there are 181"),
        ({"solver": "magic"}, "no solver"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_settings_that_cannot_be_used(pipe, change, message):
    with pytest.raises(UserError, match=message):
        QuickScorer(pipe.model.config, QuickSettings(**change))


def test_the_command_adds_a_line_a_model(pipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, table = tmp_path / "model", tmp_path / "deep" / "scores.csv"
    save_model(folder, pipe.model, torch.float32)
    line = [str(folder), "--objects", "2", "--steps", "1", "--csv", str(table)]
    assert command.main([str(folder), *line]) == 0
    assert capsys.readouterr().out.count(f"{folder}: auc ") == 2
    assert command.main(line) == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["model", "auc", "grey_auc", "similarity", "seconds"]  # two are not twenty
    assert len(rows) == 3
    assert len({row["auc"] for row in rows}) == 1
    assert np.isfinite(float(rows[0]["seconds"]))
    for damaged in (b"\xff\xfe\x00\x81", b"a\x00,b\n"):
        table.write_bytes(damaged)
        assert command.main(line) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert table.read_bytes() == damaged
    table.write_text("other,columns\n")
    assert command.main(line) == 2
    assert "has other columns than model, auc" in capsys.readouterr().err
    assert table.read_text() == "other,columns\n"


def test_models_of_other_sizes_are_not_scored_on_the_first_ones_cases(pipe, scorer):
    other = copy.deepcopy(pipe.model)
    other.config = dataclasses.replace(other.config, image_size=64)
    with pytest.raises(UserError, match=r"of \(64, 48\) px, not \(32, 48\)"):
        scorer.score(other)


def test_a_training_is_scored_on_its_way_with_the_averaged_weights(pipe):
    """Once a step that is due, however many micro-batches a step has; what it logs is the average's."""
    average, model = pipe.model, copy.deepcopy(pipe.model)
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight.mul_(1.2)
    task, log = mock.create_autospec(DiffusionTask, instance=True), mock.Mock()
    task.configure_mock(model=model, config=mock.Mock(model=model.config))

    @contextmanager
    def averaged():
        task.model = average
        yield
        task.model = model

    task.averaged_weights = averaged
    few = dataclasses.replace(SETTINGS, objects=2)
    callback = ScoreCallback(2, few)
    trainer = mock.Mock(accumulate_grad_batches=2, is_last_batch=False, is_global_zero=True, loggers=[log])
    for batch in range(8):
        trainer.global_step = (batch + 1) // 2
        callback.on_train_batch_end(trainer, task, None, None, batch)
    row = QuickScorer(model.config, few).score(average)
    values = {f"toy/{name}": value for name, value in quick_values(row).items()}
    assert values != {
        f"toy/{name}": value for name, value in quick_values(callback.scorer.score(model)).items()
    }
    assert log.log_metrics.call_args_list == [mock.call(values, step=2), mock.call(values, step=4)]
    trainer.is_global_zero = False
    callback.on_train_batch_end(trainer, task, None, None, 7)
    assert log.log_metrics.call_count == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "nowhere/model"),
        (["nowhere/model", "--objects", "1"], "for --objects. It must be at least 2"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
