"""The autoencoder in bands: the numbers of the undivided pass, when it is taken, and that it saves memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pbe.config import AutoencoderConfig
from pbe.models import AutoencoderKL, tiling
from tests.models.tiny import relative
from tests.programs import Program

CONFIGS = {
    "as published": AutoencoderConfig(channels=16, norm_groups=8),
    "shortcut": AutoencoderConfig(
        channels=16, channel_mult=[1, 2, 4], num_res_blocks=1, norm_groups=8, patch_shortcut=True
    ),
    "folded": AutoencoderConfig(
        channels=16, channel_mult=[1, 2], num_res_blocks=1, norm_groups=8, patch=2, patch_shortcut=True
    ),
    "one level": AutoencoderConfig(
        channels=8, channel_mult=[1], num_res_blocks=1, norm_groups=8, mid_attention=False
    ),
}
BANDS = [  # size of the image, positions a band, rows at least
    ((64, 64), 1, 1),
    ((72, 40), 1, 3),
    ((40, 104), 1, 8),
    ((72, 40), 64 * 20, 1),
    ((64, 64), 2**16, 8),
]


@pytest.fixture(scope="module", params=list(CONFIGS))
def autoencoder(request: pytest.FixtureRequest) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(CONFIGS[request.param]).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms as they come would not notice a wrong scale or shift
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def set_bands(monkeypatch: pytest.MonkeyPatch, positions: int, rows: int) -> None:
    monkeypatch.setattr(tiling, "POSITIONS", positions)
    monkeypatch.setattr(tiling, "MIN_ROWS", rows)


@torch.no_grad()
def both_ways(model: AutoencoderKL, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean, deviation and decoded image, in bands and whole."""
    banded, whole = copy.copy(model), copy.copy(model)
    banded.tile_above, whole.tile_above = 0, None
    one, other = banded.encode(images), whole.encode(images)
    latents = torch.randn_like(other.mean)
    return [(one.mean, other.mean), (one.std, other.std), (banded.decode(latents), whole.decode(latents))]


@pytest.mark.parametrize(("size", "positions", "rows"), BANDS)
def test_bands_change_nothing(
    autoencoder: AutoencoderKL,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    positions: int,
    rows: int,
) -> None:
    """In double precision to 13 digits, so that there can be no seam of any kind."""
    set_bands(monkeypatch, positions, rows)
    model = copy.deepcopy(autoencoder).double()
    for banded, whole in both_ways(model, torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1):
        assert relative(banded, whole) < 1e-12


def test_single_precision_differs_by_rounding(
    autoencoder: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_bands(monkeypatch, 1, 4)
    for banded, whole in both_ways(autoencoder, torch.rand(2, 3, 64, 48) * 2 - 1):
        assert relative(banded, whole) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_without_bands(
    autoencoder: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    set_bands(monkeypatch, 1, 4)
    half = copy.deepcopy(autoencoder).to(dtype)
    latents = torch.randn(1, 4, 32 // half.downsampling, 64 // half.downsampling).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(half).float().decode(latents.float())
        half.tile_above = None
        whole = half.decode(latents)
        half.tile_above = 0
        banded = half.decode(latents)
    assert banded.dtype == dtype
    error, allowed = (float((x.float() - exact).square().mean().sqrt()) for x in (banded, whole))
    assert error < 1.5 * allowed


def test_means_far_from_zero_lose_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of a map that is nearly constant survives the merging of its bands."""
    set_bands(monkeypatch, 1, 3)
    norm = torch.nn.GroupNorm(2, 4)
    x = 1000.0 + torch.randn(2, 4, 50, 9)
    scale, shift = tiling._scale_shift(norm, x)
    expected = torch.nn.functional.group_norm(x.double(), 2)
    assert relative((x * scale + shift).double(), expected) < 1e-3  # 1000 has 1e-4 of a deviation's digits
    deviation = x.double().reshape(2, 2, -1).std(dim=-1, correction=0)
    torch.testing.assert_close(scale[:, ::2, 0, 0].double(), 1.0 / deviation, rtol=1e-4, atol=0.0)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the banded functions in the order in which they are called."""
    seen: list[str] = []
    for name in ("encode_in_bands", "decode_in_bands"):
        original = getattr(tiling, name)

        def record(*args: object, name: str = name, original=original) -> torch.Tensor:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(f"pbe.models.autoencoder.{name}", record)
    return seen


def test_bands_begin_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = AutoencoderKL(CONFIGS["shortcut"]).eval(), calls(monkeypatch)
    assert model.tile_above == 1024
    model.tile_above = 32
    with torch.no_grad():
        for size in ((32, 32), (36, 8), (8, 36)):
            model.encode(torch.zeros(1, 3, *size))
            model.decode(torch.zeros(1, 4, size[0] // 4, size[1] // 4))
    assert seen == ["encode_in_bands", "decode_in_bands"] * 2


def test_gradients_are_never_lost_to_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = AutoencoderKL(CONFIGS["shortcut"]), calls(monkeypatch)
    model.tile_above = 8
    latents = torch.zeros(1, 4, 4, 4, requires_grad=True)
    model.decode(latents).sum().backward()
    assert latents.grad is not None
    assert not seen


PEAKS = """
from pathlib import Path
import torch
from pbe.config import AutoencoderConfig
from pbe.models import AutoencoderKL

torch.set_num_threads(1)
model = AutoencoderKL(AutoencoderConfig(channels=16, norm_groups=16)).eval()
with torch.no_grad():
    for side, tile_above in ((64, 0), (64, None), (640, 0), (640, None)):
        model.tile_above = tile_above
        model.decode(model.encode(torch.zeros(1, 3, side, side)).mean)
        # getrusage would start from the peak of the process that started this one
        status = Path("/proc/self/status").read_text()
        print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_saved(tmp_path: Path) -> None:
    """In a process of its own, whose peak can only rise: first in bands, then whole."""
    script = tmp_path / "peaks.py"
    script.write_text(PEAKS)
    status, output, errors = Program(script, told=tmp_path).finish()
    assert status == 0, errors
    _, before, banded, whole = map(int, output.split())
    assert whole - before > 100_000  # KiB
    assert banded - before < 0.75 * (whole - before), "about half; what the allocator keeps varies"
