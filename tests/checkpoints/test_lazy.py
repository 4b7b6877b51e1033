"""What is not needed is not read: optimizer moments stay on the disk, conversion needs hardly any memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pbe.checkpoints.loading import load_checkpoint, open_checkpoint
from pbe.checkpoints.saving import convert
from pbe.config import ModelConfig
from tests.checkpoints.small import same_weights, save_original, small_model, with_unet

MOMENTS = 30_000_000  # numbers; many times the weights of the small model

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux's /proc")


def bytes_read() -> int:
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def mapped(path: Path) -> int:
    """Bytes of a file that this process has mapped, touched or not."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = (int(value, 16) for value in line.split()[0].split("-"))
            total += end - start
    return total


def peak_over(start: Callable[[], object]) -> int:
    """Bytes of memory that a call needs at its peak, over what is used before it."""

    def status(name: str) -> int:
        return 1024 * int(re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("this system does not let a process forget its peak of memory")
    before = status("VmRSS")
    start()
    return status("VmHWM") - before


def test_optimizer_moments_are_never_touched(tmp_path: Path) -> None:
    config = with_unet(model_channels=64)
    model = small_model(config)
    weights = sum(value.nbytes for value in model.state_dict().values())
    moments = {0: {"exp_avg": torch.zeros(MOMENTS), "exp_avg_sq": torch.zeros(MOMENTS)}}
    path = save_original(tmp_path / "model.ckpt", model, optimizer_states=[{"state": moments}])
    assert path.stat().st_size > 8 * weights
    before = bytes_read()
    loaded = load_checkpoint(path, config=config)
    # pages are whole, and small tensors are copied instead of being mapped
    assert bytes_read() - before + mapped(path) < 1.3 * weights + 1_000_000
    assert same_weights(loaded.model, model)


@pytest.mark.parametrize(
    ("layout", "dtype"), [("native", None), ("compvis", torch.float16), ("diffusers", None)]
)
def test_peak_of_a_conversion(tmp_path: Path, layout: str, dtype: torch.dtype | None) -> None:
    """Under 1.3 times the tensors kept is the promise; one tensor after the other needs far less."""
    config = with_unet(model_channels=192)
    path, weights = _big_checkpoint(tmp_path, config)
    needed = peak_over(lambda: convert(open_checkpoint(path, config), tmp_path / layout, layout, dtype))
    assert needed < 0.5 * weights, (needed, weights)


def _big_checkpoint(folder: Path, config: ModelConfig) -> tuple[Path, int]:
    model = small_model(config)
    moments = {0: {"exp_avg": torch.zeros(MOMENTS)}}
    path = save_original(folder / "model.ckpt", model, optimizer_states=[{"state": moments}])
    return path, sum(value.nbytes for value in model.state_dict().values())
