"""Runs that can be compared: one start, one end, one path of noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import make_schedule
from scripts.benchmarks.convergence import BrownianPath, Candidate, distance, solve, steps_for

SCHEDULE = make_schedule(ScheduleConfig())
SHAPE = (2, 2, 8, 8)
FLOWS = [
    Candidate("DDIM", "ddim"),
    Candidate("PLMS", "plms"),
    Candidate("PNDM", "pndm"),
    Candidate("DPM-Solver++", "dpmpp_2m"),
    Candidate("DPM-Solver++, Karras", "dpmpp_2m", karras=True),
    Candidate("UniPC", "unipc"),
    Candidate("Euler", "euler"),
    Candidate("Heun", "heun"),
    Candidate("Heun, Karras", "heun", karras=True),
    Candidate("LMS", "lms"),
]
SDES = [
    Candidate("DDIM, eta 1", "ddim", eta=1.0),
    Candidate("Euler ancestral", "euler_ancestral"),
    Candidate("DPM-Solver++ SDE", "dpmpp_sde"),
]


def gaussian_data(x: Tensor, timesteps: Tensor) -> Tensor:
    """The exact noise prediction of data with mean 0.7 and deviation 0.5."""
    signal, sigma = SCHEDULE.signal_noise(timesteps, x)
    return sigma * (x - signal * 0.7) / (signal**2 * 0.25 + sigma**2)


@pytest.fixture(scope="module")
def path() -> BrownianPath:
    return BrownianPath(SCHEDULE, SHAPE, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def ends(candidates: list[Candidate], path: BrownianPath, start: Tensor, steps: int) -> list[Tensor]:
    return [solve(each, gaussian_data, start, SCHEDULE, steps, path).latents for each in candidates]


@pytest.mark.parametrize("candidates", [FLOWS, SDES], ids=["flow", "SDE"])
def test_all_solvers_go_to_one_solution(
    candidates: list[Candidate], path: BrownianPath, start: Tensor
) -> None:
    reference = ends(candidates[-1:], path, start, 1000)[0]
    coarse = [distance(each, reference) for each in ends(candidates, path, start, 20)]
    fine = [distance(each, reference) for each in ends(candidates, path, start, 500)]
    assert max(fine) < 0.05
    assert all(near < 0.5 * far for near, far in zip(fine, coarse, strict=True))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Candidate("DDIM", "ddim"), Candidate("Euler", "euler")),
        (Candidate("PLMS", "plms"), Candidate("PNDM", "pndm")),
        (Candidate("DDIM, eta 1", "ddim", eta=1.0), Candidate("Euler ancestral", "euler_ancestral")),
    ],
    ids=lambda candidate: candidate.label,
)
def test_methods_with_two_names(one: Candidate, other: Candidate, path: BrownianPath, start: Tensor) -> None:
    ended = ends([one, other], path, start, 20)
    torch.testing.assert_close(ended[0], ended[1], rtol=1e-6, atol=1e-6)


def test_the_flow_and_the_sde_have_solutions_of_their_own(path: BrownianPath, start: Tensor) -> None:
    flow, sde = ends([FLOWS[0], SDES[0]], path, start, 500)
    assert distance(flow, sde) > 0.1


def test_a_path_is_standard_normal_over_steps_of_any_length() -> None:
    path = BrownianPath(SCHEDULE, (4, 4, 32, 32), torch.Generator().manual_seed(3))
    alphas = SCHEDULE.alphas_cumprod
    for start, end in ((999, 998), (999, 500), (700, 10), (1, 0)):
        noise = path.noise(float(alphas[start]), float(alphas[end]))
        assert float(noise.mean()) == pytest.approx(0.0, abs=0.03)
        assert float(noise.std()) == pytest.approx(1.0, abs=0.03)


def test_a_path_adds_up() -> None:
    path = BrownianPath(SCHEDULE, (1, 1, 2, 2), torch.Generator().manual_seed(3))
    levels = [float(SCHEDULE.alphas_cumprod[t]) for t in (800, 400, 100)]
    clock = [level / (1.0 - level) for level in levels]

    def moved(start: int, end: int) -> Tensor:
        return path.noise(levels[start], levels[end]) * (clock[end] - clock[start]) ** 0.5

    torch.testing.assert_close(moved(0, 1) + moved(1, 2), moved(0, 2))
    assert not path.noise(levels[0], 1.0).any()
    with pytest.raises(ValueError, match="levels of timesteps"):
        path.noise(levels[0], 0.5 * (levels[1] + levels[2]))


@pytest.mark.parametrize("candidate", [*FLOWS, *SDES], ids=lambda candidate: candidate.label)
@pytest.mark.parametrize("calls", [5, 8, 25])
def test_a_budget_is_kept(candidate: Candidate, calls: int, path: BrownianPath, start: Tensor) -> None:
    solution = solve(candidate, gaussian_data, start, SCHEDULE, steps_for(candidate, calls), path)
    assert calls - 1 <= solution.calls <= calls
    assert candidate.stochastic == (candidate in SDES)


def test_distance_is_relative() -> None:
    reference = torch.ones(3, 1, 2, 2)
    assert distance(reference, reference) == 0.0
    assert distance(1.1 * reference, reference) == pytest.approx(0.1)
    assert distance(-5.0 * reference, -4.0 * reference) == pytest.approx(0.25)
