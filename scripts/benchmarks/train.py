"""Time training steps beside a plain Lightning module around diffusers' UNet, with the same loss.

python scripts/benchmarks/train.py                  # the toy model's sizes
python scripts/benchmarks/train.py --full           # the official sizes at 256 px: needs 40 GB
python scripts/benchmarks/train.py --compile        # and both compiled

Both train UNet, mapper and null condition from encoded batches in memory, with AdamW, a moving average and
one precision, in rounds that take turns. The peer has what such a module needs and no more: no log, no guard.
Ours is the project's whole training. That both have one loss is checked on one batch and one set of draws.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from pbe.config import Config, load_config
from pbe.diffusion.objective import drop_condition
from pbe.diffusion.schedule import make_schedule
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.codec import Posterior
from pbe.training.resume.signals import StopSignals
from pbe.training.setup import apply_performance_options, make_task, make_trainer
from pbe.training.tasks.encoding import Draws, EncodedBatch, draw
from scripts.benchmarks.common import (
    CLOCKS,
    ROOT,
    command_line,
    machine,
    make_parser,
    own_file,
    peak_memory,
    print_rows,
    ratio,
    read_options,
    wait_for,
    write,
)
from scripts.benchmarks.unet import same_weights

BATCHES = 4  # different ones in memory
PEER = "plain Lightning around diffusers"
SAME = 1e-4  # relative difference of the losses, of which more is an error


class Plain(pl.LightningModule):
    """What one would write around diffusers' UNet."""

    def __init__(self, config: Config, model: LatentDiffusion) -> None:
        super().__init__()
        self.unet = same_weights(copy.deepcopy(model.unet), config.model)
        assert self.unet is not None
        self.unet.train().requires_grad_(True)
        self.encoder = copy.deepcopy(model.exemplar_encoder)
        self.encoder.tower.requires_grad_(False)
        self.average = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(config.optimizer.ema_decay))
        self.config, self.schedule = config, make_schedule(config.model.schedule)

    def loss(self, batch: EncodedBatch, draws: Draws) -> Tensor:
        """Return the mean squared error of the predicted noise, or of v."""
        assert self.unet is not None
        scale, device = self.config.model.autoencoder.scale_factor, batch.keep_mask.device
        noise, timesteps = draws.noise.to(device), draws.timesteps.to(device)
        latents = batch.image.sample(draws.image_noise.to(device)) * scale
        masked = batch.masked.sample(draws.masked_noise.to(device)) * scale
        condition = self.encoder.condition(batch.features)
        null = self.encoder.null_condition.expand(len(noise), condition.shape[1], -1)
        dropped = draws.drop.to(device) < self.config.objective.drop_probability
        condition = drop_condition(condition, null, dropped)
        signal, sigma = self.schedule.signal_noise(timesteps, latents)
        x_t = signal * latents + sigma * noise
        output = self.unet(torch.cat([x_t, masked, batch.keep_mask], dim=1), timesteps, condition).sample
        v = self.config.model.prediction == "v"
        return F.mse_loss(output, signal * noise - sigma * latents if v else noise)

    def training_step(self, batch: EncodedBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        noises = torch.randn(3, *batch.image.mean.shape, device=self.device).unbind()
        count = len(noises[0])
        timesteps = torch.randint(self.schedule.timesteps, (count,), device=self.device)
        return self.loss(batch, Draws(timesteps, torch.rand(count), *noises))

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the average."""
        assert self.unet is not None
        self.average.update_parameters(self.unet)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device."""
        return batch.to(device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        options, trained = self.config.optimizer, [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=options.weight_decay)


class Clock(pl.Callback):
    """Notes when each step ended, by one of the clocks."""

    def __init__(self, kind: str) -> None:
        self.read, self.ends = CLOCKS[kind], list[float]()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the end of a step."""
        wait_for(trainer.strategy.root_device)
        self.ends.append(self.read())


def make_config(options: argparse.Namespace) -> Config:
    """Return the configuration of both sides: blocks as diffusers has them too."""
    name, precision = ("paper", "bf16-mixed") if options.full else ("toy", options.precision)
    settings = [
        *("model.unet.norm=group", "model.unet.modulation=false", "optimizer.name=adamw"),
        *("optimizer.ema_decay=0.999", "optimizer.warmup_steps=1", "objective.weighting=uniform"),
        *("trainer.devices=1", "trainer.strategy=auto", "trainer.progress=false", "trainer.resume=never"),
        *("logging.loggers=[]", "logging.grid_every=0", "init_from=none", "autoencoder_from="),
        f"trainer.precision={precision}",
        f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}",
        f"trainer.max_steps={options.steps + options.warm_up}",
    ]
    if options.full:
        settings += ["optimizer.fused=true", "trainer.gradient_checkpointing=false"]
    else:
        settings += ["model.unet.norm_groups=32"]
    return load_config(ROOT / "configs" / f"{name}.yaml", [*settings, *options.overrides])


def encoded_batches(config: Config, model: LatentDiffusion, batch: int, size: int) -> list[EncodedBatch]:
    """Draw batches such as a latent cache gives."""
    generator = torch.Generator().manual_seed(0)
    channels, side = config.model.autoencoder.latent_channels, size // model.autoencoder.downsampling
    pixels = torch.zeros(1, 3, *[config.model.exemplar_encoder.image_size] * 2)
    with torch.no_grad():
        tokens = model.exemplar_encoder.features(pixels).shape[1:]

    def posterior() -> Posterior:
        mean = torch.randn(batch, channels, side, side, generator=generator)
        return Posterior(mean, torch.full_like(mean, 0.1))

    return [
        EncodedBatch(
            posterior(),
            posterior(),
            (torch.rand(batch, 1, side, side, generator=generator) > 0.5).float(),
            torch.ones(batch, 1, side, side),
            torch.randn(batch, *tokens, generator=generator),
            torch.arange(batch) + number * batch,
        )
        for number in range(BATCHES)
    ]


def check_losses(config: Config, model: LatentDiffusion, plain: Plain, batch: EncodedBatch) -> float:
    """Return the relative difference of both sides' loss on one batch and one set of draws.

    Raises:
        UserError: they are not the same.
    """
    task: Any = make_task(config, model)
    channels, height, width = batch.image.mean.shape[1:]
    shape = channels, height, width
    draws = draw(0, batch.sample_index, shape, task.schedule.timesteps, "train")
    with torch.no_grad():
        dropped = draws.drop < config.objective.drop_probability
        ours, theirs = task.losses(batch, draws, dropped)[0].mean(), plain.loss(batch, draws)
    difference = float((ours - theirs).abs() / theirs.abs())
    if difference > SAME:
        raise UserError(f"the losses differ: {float(ours)} here, {float(theirs)} there")
    return difference


def time_steps(
    trainer: pl.Trainer, module: pl.LightningModule, clock: Clock, batches: Any, skip: int
) -> float:
    """Train, and return the seconds of a step: the median of all but the first ``skip``."""
    loader: Any = DataLoader(batches * 10_000, batch_size=None, shuffle=False)
    trainer.fit(module, train_dataloaders=loader)
    ends = clock.ends[skip - 1 :]
    return median(later - earlier for earlier, later in pairwise(ends))


def train_ours(config: Config, model: LatentDiffusion, batches: Any, skip: int, clock: Clock) -> float:
    """Return the seconds of one of our steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, Path(folder), StopSignals(), callbacks=[clock])
        trainer.limit_val_batches = 0
        return time_steps(trainer, make_task(config, model), clock, batches, skip)


def train_plain(config: Config, module: Plain, batches: Any, skip: int, clock: Clock) -> float:
    """Return the seconds of one of the plain module's steps."""
    trainer = pl.Trainer(
        max_steps=config.trainer.max_steps,
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,  # type: ignore[arg-type]
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return time_steps(trainer, module, clock, batches, skip)


def compiled_sides(
    config: Config, model: LatentDiffusion, batches: Any, skip: int
) -> dict[str, Callable[[Clock], float]]:
    """Return both sides with their UNets compiled, on copies of the weights."""
    compiled, plain = copy.deepcopy(model), Plain(config, model)
    assert plain.unet is not None
    plain.unet.compile()
    apply_performance_options(compiled, replace(config.trainer, compile=True))
    return {
        "ours, compiled": lambda clock: train_ours(config, compiled, batches, skip, clock),
        f"{PEER}, compiled": lambda clock: train_plain(config, plain, batches, skip, clock),
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Measure both sides in turns; returns the table."""
    config = make_config(options)
    torch.manual_seed(0)
    model = LatentDiffusion(config.model)
    batch, size = options.batch_size or config.data.batch_size, config.model.image_size
    if options.full:
        batch, size = options.batch_size or 1, 256
    config.data.batch_size = batch
    batches = encoded_batches(config, model, batch, size)
    with torch.no_grad():  # layers that start at zero would hide the others from the check
        for parameter in model.unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    plain = Plain(config, model)
    difference = check_losses(config, model, plain, batches[0])
    sides: dict[str, Callable[[Clock], float]] = {
        "ours": lambda clock: train_ours(config, model, batches, options.warm_up, clock),
        PEER: lambda clock: train_plain(config, plain, batches, options.warm_up, clock),
    }
    if options.compile:
        sides |= compiled_sides(config, model, batches, options.warm_up)
    apply_performance_options(model, config.trainer)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, train in sides.items():
            seconds[name].append(train(Clock(options.clock)))
            gc.collect()
    rows = {
        name: {
            "a step, s": median(each),
            "samples a second": batch / median(each),
            "speed": ratio(seconds[PEER], each),
        }
        for name, each in seconds.items()
    }
    rows["both"] = {"difference of losses": difference, "peak GiB": peak_memory(options.device)}
    title = f"training, {'full' if options.full else 'toy'} size, {size} px, batch {batch}, "
    title += config.trainer.precision
    title += "".join(f", {override}" for override in options.overrides)
    print_rows(title, rows)
    return {title: rows}


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used, diffusers is missing, or the losses differ.
    """
    parser = make_parser(__doc__, "train", repeats=3)
    parser.add_argument("--full", action="store_true", help="the official sizes at 256 px")
    parser.add_argument("--compile", action="store_true", help="also both compiled")
    parser.add_argument("--precision", default="bf16-mixed", help="of the toy sizes (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=0, help="default: toy 96, full 1")
    parser.add_argument("--steps", type=int, default=20, help="measured in each turn (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    options = read_options(parser, arguments)
    if min(options.steps, options.warm_up) < 1 or options.batch_size < 0:
        raise UserError("--steps and --warm-up must be at least 1, --batch-size not below 0")
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("there is nothing to compare with: pip install diffusers")
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(machine(options.device))
    own_file(options, "train", "_full" * options.full + "_compiled" * options.compile)
    write(options, measure(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
