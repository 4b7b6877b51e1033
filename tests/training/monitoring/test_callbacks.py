"""Sample grids: their layout, and that drawing one changes nothing; a process's peak memory."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.errors import UserError
from pbe.training.monitoring.callbacks import (
    diffusion_grid,
    fixed_samples,
    process_peak,
    tile,
    to_uint8,
)
from pbe.training.setup import build_model
from pbe.training.tasks.diffusion import DiffusionTask
from tests.training.tiny import run, tiny_config


def test_tiles_stand_side_by_side_with_two_white_pixels_between():
    columns = [np.full((2, 3, 4, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = tile(columns)
    assert grid.shape == (2 * (3 + 2), 3 * (4 + 2), 3)
    assert [int(grid[2, x, 0]) for x in (0, 1, 5, 6, 7, 17)] == [255, 10, 255, 255, 20, 255]
    assert (grid[4:6] == 255).all()


def test_pixels_are_clipped_and_rounded():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_peak_memory_is_the_processs_own():
    """Not that of the process that started it, which the system counts to it otherwise."""
    np.ones(2**25)  # 256 MiB, for a moment
    assert process_peak() > 2**28
    # by itself, since what it is imported with takes more than this process holds
    code = f"import resource, sys\nfrom pathlib import Path\n{inspect.getsource(process_peak)}\n"
    command = [sys.executable, "-c", f"{code}print(process_peak())"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 2**22 < int(shown) < 2**27


def test_a_grid_is_repeatable_and_leaves_no_trace(shards, autoencoder, tmp_path):
    settings = ["logging.grid_guidance=[1,3]", "logging.grid_samples=2"]
    model, config = build_model(tiny_config(shards, tmp_path, autoencoder, *settings))
    task = DiffusionTask(config, model)
    source = diffusion_grid(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = source(task), source(task)
    assert first.shape == (2 * 34, 5 * 34, 3)
    assert np.array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # the first column is the image itself, the second the same with a grey hole
    samples = fixed_samples(config, 2)
    pictures = samples["image"].permute(0, 2, 3, 1).numpy()
    hole = samples["mask"][0, 0].numpy() > 0
    assert np.array_equal(first[1:33, 1:33], pictures[0])
    assert np.array_equal(first[1:33, 35:67][~hole], pictures[0][~hole])
    assert (first[1:33, 35:67][hole] == 128).all()


def test_images_that_cannot_be_used_are_one_clear_line(shards, tmp_path):
    settings = ["data.min_box_area=0.98", "data.max_box_area=0.99"]
    with pytest.raises(UserError, match=r"none of the first validation images can be used .* \(no box"):
        fixed_samples(tiny_config(shards, tmp_path, *settings), 3)


def test_the_grid_uses_the_averaged_weights(shards, autoencoder, tmp_path):
    model, config = build_model(tiny_config(shards, tmp_path, autoencoder, "logging.grid_samples=1"))
    task = DiffusionTask(config, model)
    source = diffusion_grid(config)
    before = source(task)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.1)
    assert np.array_equal(source(task), before)


def test_grids_are_drawn_when_due_and_at_the_end(shards, autoencoder, tmp_path):
    settings = ["trainer.max_steps=5", "logging.grid_every=2", "trainer.accumulate=2", "logging.grid_steps=2"]
    config = tiny_config(shards, tmp_path, autoencoder, *settings)
    run(config)
    files = sorted((tmp_path / "grids").iterdir())
    assert [path.name for path in files] == [f"step{step:07d}.png" for step in (2, 4, 5)]
    for path in files:
        with Image.open(path) as grid:
            columns = 3 + len(config.logging.grid_guidance)
            assert grid.size == (columns * 34, config.logging.grid_samples * 34)
