"""The plan of a run: every parameter counted once, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pbe.models import LatentDiffusion
from pbe.models.adapters import adapters_of
from pbe.training import plan
from pbe.training.activations import TrainingStep, activation_bytes
from pbe.training.plan import count_parameters, make_plan, state_bytes
from pbe.training.setup import apply_performance_options, make_task
from pbe.training.tasks.diffusion import DiffusionTask
from tests.training.tiny import run, tiny_config

NOWHERE = Path("nowhere")


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_every_parameter_is_counted_once(tokens: str):
    config = tiny_config(NOWHERE, NOWHERE, f"model.exemplar_encoder.tokens={tokens}")
    task = make_task(config, LatentDiffusion(config.model))
    counts = count_parameters(task)
    assert sum(c.trained + c.frozen + c.dead for c in counts.values()) == sum(
        p.numel() for p in task.model.parameters()
    )
    assert counts["image tower"].trained == counts["autoencoder"].trained == counts["UNet"].frozen == 0
    width = config.model.exemplar_encoder.mapper_width
    mapper = config.model.exemplar_encoder.mapper_layers * 2 * (width * width + width)
    assert counts["bottleneck"].dead == (mapper if tokens == "class" else 0)
    assert (counts["UNet"].dead > 0) == (tokens == "class")
    frozen = sum(p.numel() for p in task.model.unet.parameters() if not p.requires_grad)
    assert counts["UNet"].dead == frozen


def test_the_autoencoder_stage_trains_the_autoencoder_only():
    config = tiny_config(NOWHERE, NOWHERE, "task=autoencoder")
    task = make_task(config, LatentDiffusion(config.model))
    counts = count_parameters(task)
    total = sum(p.numel() for p in task.model.autoencoder.parameters())
    assert counts["autoencoder"].trained == total
    assert [counts[name].trained for name in ("UNet", "bottleneck", "image tower")] == [0, 0, 0]
    everything = sum(p.numel() for p in task.model.parameters())
    assert state_bytes(task) == {
        "weights": 4 * everything, "gradients": 4 * total, "moments": 8 * total, "moving average": 4 * total,
    }  # fmt: skip
    config.optimizer.name = "muon"  # whose matrices have one moment
    assert state_bytes(task)["moments"] == 4 * total


def test_a_plan_measures_and_leaves_nothing(shards, autoencoder, tmp_path):
    settings = ["trainer.max_steps=100", "trainer.accumulate=2", f"cache.folder={tmp_path / 'cache'}"]
    text = "\n".join(make_plan(tiny_config(shards, tmp_path / "run", autoencoder, *settings)))
    assert "samples: 8 an epoch, 4 a step; 2 steps an epoch" in text
    assert "samples a second over 10 steps on 1 device(s), peak memory" in text
    assert "length: 100 steps, 50.00 epochs" in text
    assert "this run: 100 steps, " in text
    assert "40 epochs of Open Images' 1.7 million images with boxes: " in text
    assert "note: the latent cache is not built yet (0.00 GiB); measured without it" in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_the_steps_of_epochs_before_it_measures(shards, autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_duration", lambda *_: [])
    settings = ["trainer.max_steps=0", "trainer.max_epochs=3", "data.batch_size=3"]
    lines = list(make_plan(tiny_config(shards, tmp_path / "run", autoencoder, *settings)))
    assert "samples: 8 an epoch, 3 a step; 2 steps an epoch" in lines
    assert "length: 6 steps, 3.00 epochs" in lines


def test_a_plan_without_data_and_autoencoder_says_what_is_missing(tmp_path):
    text = "\n".join(make_plan(tiny_config(tmp_path / "nowhere", tmp_path / "run")))
    assert text.startswith("parameters")
    assert "no data, so nothing is measured" in text
    assert "note: random weights: autoencoder_from is empty" in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_does_not_change_the_run_that_follows(shards, autoencoder, tmp_path):
    config = tiny_config(shards, tmp_path / "run", autoencoder)
    assert list(make_plan(config))
    assert run(config).steps == 3


def test_what_cannot_fit_is_counted_and_not_tried(shards, autoencoder, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run", autoencoder)
    monkeypatch.setattr(plan, "available_memory", lambda: 1000)
    monkeypatch.setattr(plan, "_duration", lambda *_: pytest.fail("measured what cannot fit"))
    lines = list(make_plan(config))
    assert lines[0].startswith("parameters")
    assert lines[-1].startswith("not measured: beside the weights training holds 0.")
    assert lines[-1].endswith("and 0.00 GiB are free")


def test_what_is_counted_comes_before_anything_is_measured(shards, autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_duration", lambda *_: pytest.fail("measured first"))
    first = next(make_plan(tiny_config(shards, tmp_path / "run", autoencoder)))
    assert first.startswith("parameters")


SETTINGS = {
    "all": [],
    "mixed": ["trainer.precision=bf16-mixed"],
    "recomputed": ["trainer.gradient_checkpointing=true"],
    "adapters": ["lora.rank=2", "init_from=toy"],
    "parts": ["optimizer.parts=[mapper,feed_forward]"],
}


def plan_task(tmp_path: Path, *settings: str) -> DiffusionTask:
    config = tiny_config(tmp_path, tmp_path / "run", *settings)
    model = LatentDiffusion(config.model)
    apply_performance_options(model, config.trainer)
    task = make_task(config, model)
    assert isinstance(task, DiffusionTask)
    return task


@pytest.mark.parametrize("kind", SETTINGS)
def test_activations_are_those_that_autograd_keeps(tmp_path, kind: str):
    """The same hooks on a real forward pass, whose weights are told by their memory."""
    task = plan_task(tmp_path, *SETTINGS[kind])
    weights = {p.untyped_storage().data_ptr() for p in task.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "mixed"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        loss = TrainingStep(task.model)(task.config.data.batch_size, "cpu")
    assert activation_bytes(task, "cpu") == pytest.approx(sum(kept.values()), rel=0.01)
    assert loss.requires_grad


def test_adapters_are_what_is_trained_and_counted(tmp_path):
    task = plan_task(tmp_path, *SETTINGS["adapters"])
    counts, plain = count_parameters(task), count_parameters(plan_task(tmp_path))
    ranks = [p.numel() for _, adapter in adapters_of(task.model) for p in adapter.parameters()]
    assert counts["UNet"].trained + counts["bottleneck"].trained == sum(ranks)
    for name, count in counts.items():
        assert count.dead == plain[name].dead
        assert count.frozen == plain[name].trained + plain[name].frozen
    sizes = state_bytes(task)
    assert sizes["gradients"] == 4 * sum(ranks) == sizes["moments"] / 2 == sizes["moving average"]
    of_base = [p for _, p in task.model.unet.named_parameters() if not p.requires_grad]
    assert {p.element_size() for p in of_base} == {2}
    less = activation_bytes(task, "cpu"), activation_bytes(plan_task(tmp_path), "cpu")
    assert less[0] < 0.7 * less[1]
