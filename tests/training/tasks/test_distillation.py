"""Distillation: what is trained, what the losses are made of, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pbe.config import Config
from pbe.config.checks import check_values
from pbe.diffusion.distillation import TEACHER
from pbe.diffusion.solvers import FEW_STEPS_SOLVER, get_solver
from pbe.editing.engine import Conditioning, noise_predictor
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.adapters import adapters_of
from pbe.training.setup import make_task
from pbe.training.tasks.distillation import DistillationTask
from pbe.training.tasks.encoding import Draws, EncodedBatch
from tests.training.tasks.test_diffusion import awaken, config_of, draws_for, encoded

BASE = ("task=distillation", "init_from=model", "distillation.steps=2", "distillation.teacher_steps=4")
ONE = "distillation.guidance=[1,1]"
RANK_2 = (
    "lora.rank=2",
    "lora.targets=[residual,feed_forward]",
    "lora.base=fp32",
    "distillation.guidance=[3,3]",
)


def made(*overrides: str) -> tuple[DistillationTask, EncodedBatch, Draws]:
    config: Config = config_of(*BASE, *overrides)
    torch.manual_seed(0)
    model = LatentDiffusion(config.model)
    awaken(model)
    task = make_task(config, model)
    assert isinstance(task, DistillationTask)
    batch = encoded(task.model, 4)
    return task, batch, draws_for(task, batch)


def known(task: DistillationTask, batch: EncodedBatch, draws: Draws) -> Conditioning:
    """The conditioning, made by hand."""
    scale = task.config.model.autoencoder.scale_factor
    masked = (batch.masked.mean + batch.masked.std * draws.masked_noise) * scale
    with torch.no_grad():
        return Conditioning(task.model.exemplar_encoder.condition(batch.features), masked, batch.keep_mask)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_student_starts_as_its_teacher_without_guidance(prediction: str):
    """At guidance 1 a student that starts as its teacher is right where the teacher ends the step itself."""
    task, batch, draws = made(ONE, "distillation.method=consistency", f"model.prediction={prediction}")
    last = torch.tensor([251, 400, 750, 999])  # of four levels the second and the fourth end a step
    draws = Draws(last, draws.drop, draws.noise, draws.image_noise, draws.masked_noise)
    assert float(task.distances(batch, draws).detach().max()) < 1e-4
    first = torch.tensor([0, 100, 500, 700])
    draws = Draws(first, draws.drop, draws.noise, draws.image_noise, draws.masked_noise)
    assert float(task.distances(batch, draws).detach().min()) > 1e-3


def test_the_trajectory_is_that_of_an_edit():
    """The student's walk is that of its solver, and its errors are those to the teacher's walk."""
    task, batch, draws = made("distillation.guidance=[2,6]", "distillation.huber=1e-6")
    with torch.no_grad():
        task.model.unet.guidance_embed.weight.normal_(std=0.3)
    given, schedule = known(task, batch, draws), task.schedule
    scales = 2 + 4 * draws.drop.float()
    walks: list[list[Tensor]] = [[draws.noise], []]

    def note(index: int, timestep: float, x: Tensor) -> None:
        walks[0].append(x)

    def note_teacher(index: int, timestep: float, x: Tensor) -> None:
        if index % 2:
            walks[1].append(x)

    with torch.no_grad():
        student = noise_predictor(task.model, schedule, given, scales)
        get_solver("lcm")(student, draws.noise, schedule, 2, callback=note, settings=FEW_STEPS_SOLVER)
        teacher = noise_predictor(task.teacher, schedule, given, scales.view(-1, 1, 1, 1))
        get_solver("dpmpp_2m")(teacher, draws.noise, schedule, 4, callback=note_teacher, settings=TEACHER)
    found = task.distances(batch, draws).detach()
    levels = [*schedule.alphas_cumprod[[999, 499]].tolist(), 1.0]
    for index in range(2):
        now, after = levels[index], levels[index + 1]
        sine = ((1 - now) * after) ** 0.5 - (now * (1 - after)) ** 0.5
        missed = (walks[0][index + 1] - walks[1][index]).abs() / sine
        expected = (missed * batch.valid).sum(dim=(1, 2, 3)) / (
            batch.valid.sum(dim=(1, 2, 3)) * missed.shape[1]
        )
        assert torch.allclose(found[index], expected, rtol=1e-3, atol=1e-4)


def test_consistency_follows_the_average_of_the_student():
    task, batch, draws = made("distillation.method=consistency")
    early = torch.tensor([0, 100, 500, 700])
    draws = Draws(early, draws.drop, draws.noise, draws.image_noise, draws.masked_noise)
    before = task.distances(batch, draws).detach()
    weights = {name: value.clone() for name, value in task.model.state_dict().items()}
    assert task.ema is not None
    for average in task.ema.average.values():
        average.mul_(1.3)
    after = task.distances(batch, draws).detach()
    assert not torch.allclose(before, after)
    assert all(torch.equal(value, weights[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize("method", ["trajectory", "consistency"])
def test_the_unet_alone_learns_and_all_of_it(method: str):
    task, batch, draws = made(f"distillation.method={method}")
    task.distances(batch, draws).mean().backward()
    learning = {name for name, p in task.named_parameters() if p.requires_grad}
    assert learning
    assert all(name.startswith("model.unet.") for name in learning)
    assert "model.unet.guidance_embed.weight" in learning
    with_gradient = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == learning
    assert not any(p.requires_grad or p.grad is not None for p in task.teacher.unet.parameters())


def test_the_teacher_is_no_part_of_a_checkpoint_and_stays_as_it_is():
    task, batch, draws = made()
    unet = copy.deepcopy(task.teacher.unet.state_dict())
    assert set(task.state_dict()) == {f"model.{name}" for name in task.model.state_dict()}
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.1)
    task.distances(batch, draws).mean().backward()
    optimizer.step()
    assert all(torch.equal(value, unet[name]) for name, value in task.teacher.unet.state_dict().items())
    assert task.teacher.config.unet.guidance_range == []
    assert task.model.config.unet.guidance_range == task.config.model.unet.guidance_range == [1.0, 8.0]
    assert task.model.config.unet.few_steps == 2


def test_beside_adapters_the_base_is_the_teacher():
    task, batch, draws = made(*RANK_2)
    before = task._teacher_states(draws.noise, known(task, batch, draws), torch.full((4,), 3.0))
    with torch.no_grad():
        for _, adapter in adapters_of(task.model):
            adapter.up.normal_(std=0.3)
    after = task._teacher_states(draws.noise, known(task, batch, draws), torch.full((4,), 3.0))
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert {adapter.factor for _, adapter in adapters_of(task.model)} == {1.0}
    assert task.teacher.unet is task.model.unet
    task.distances(batch, draws).mean().backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["trajectory", "consistency"])
def test_training_comes_nearer_to_the_teacher(method: str):
    task, batch, draws = made(f"distillation.method={method}")
    # one step of the teacher before the end of a student's: what it has to reach is the teacher's own state
    last = torch.tensor([251, 400, 750, 999])
    draws = Draws(last, draws.drop, draws.noise, draws.image_noise, draws.masked_noise)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 2e-3)
    before = float(task.distances(batch, draws).detach().mean())
    for _ in range(40):
        optimizer.zero_grad()
        task.distances(batch, draws).mean().backward()
        optimizer.step()
    assert float(task.distances(batch, draws).detach().mean()) < 0.5 * before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("init_from=none",), "starts from a trained model"),
        (("distillation.guidance=[5]",), "two numbers from 0 up, the lower first"),
        (("distillation.guidance=[5,2]",), "two numbers from 0 up, the lower first"),
        (("distillation.teacher_steps=5",), "a multiple of 'distillation.steps', 2, such as 6"),
        (("distillation.teacher_steps=2",), "a multiple of"),
        (("optimizer.parts=[residual]",), "'optimizer.parts' is for task=diffusion"),
        (("lora.rank=2", "lora.targets=[residual]"), "adapters have no input for it; give one scale twice"),
        (("lora.rank=2", ONE), "names 'mapper', which distillation leaves as it is"),
    ],
)
def test_what_does_not_go_together_is_told(overrides: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        check_values(config_of(*BASE, *overrides))


def test_what_was_distilled_is_neither_a_teacher_nor_trained_on():
    few = ("model.unet.guidance_range=[1,8]", "model.unet.few_steps=4")
    with pytest.raises(UserError, match="was distilled, for 4 steps"):
        made(*few)
    config = config_of("init_from=model", *few)
    with pytest.raises(UserError, match="was distilled, for 4 steps"):
        make_task(config, LatentDiffusion(config.model))


def test_the_plan_counts_the_teacher_and_all_calls(tmp_path: Path):
    from pbe.training.activations import activation_bytes
    from pbe.training.plan import state_bytes

    task, *_ = made()
    sizes = state_bytes(task)
    unet = sum(p.numel() for p in task.teacher.unet.parameters())
    assert sizes["teacher"] == 4 * unet
    assert "teacher" not in state_bytes(made(*RANK_2)[0])
    single = activation_bytes(made("distillation.method=consistency")[0], "cpu")
    assert activation_bytes(task, "cpu") == pytest.approx(2 * single, rel=0.05)


def test_what_only_distillation_sets_is_refused_elsewhere():
    config = config_of("init_from=none", "model.unet.guidance_range=[1,8]")
    with pytest.raises(UserError, match=r"'model\.unet\.few_steps' are what task=distillation sets"):
        make_task(config, LatentDiffusion(config.model))
