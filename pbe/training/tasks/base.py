"""Base class of the training tasks: optimizer steps, moving average, logged sums and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pbe.config import Config, to_dict
from pbe.errors import UserError
from pbe.training.optimization.non_finite import Guard, gradient_norm
from pbe.training.optimization.optimizer import Ema, make_optimizer
from pbe.training.optimization.sharding import from_all_ranks, gathered, is_distributed, is_sharded, shard
from pbe.training.resume.files import recount_batches, report

NORMAL_95 = 1.96  # half-width of a 95 % interval, in standard errors


class BaseTask(pl.LightningModule):
    """A Lightning module with this project's optimizer and moving average.

    Subclasses build their networks in ``__init__``, freeze what is not trained, and call
    :meth:`start_average` last.
    """

    model: nn.Module
    shown: tuple[str, ...] = ("val/loss",)  # validation values to show at the progress bar
    adapted: bool = False  # adapters are trained, and all other weights frozen
    entry: str = ""  # method through which a step uses all weights, for sharding; empty: not possible

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.ema: Ema | None = None  # the moving average, unless it is off
        self.sums = Sums()  # training values since the last row of the log
        self.validation_sums = Sums()  # values of the current validation
        self.guard = Guard(config.trainer)  # checks the gradients before every step
        self.step_made = True  # the last step was not skipped
        self.rate = 0.0  # learning rate of the last optimizer step
        self.loaded_step = 0  # optimizer step of the checkpoint that was loaded
        self.validated_step = -1  # optimizer step of the last validation, -1 before any

    def start_average(self) -> None:
        """Begin the moving average of the trainable parameters, unless the decay is 0 (off)."""
        if self.config.optimizer.ema_decay > 0:
            self.ema = Ema(self, self.config.optimizer.ema_decay)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a share of the weights only."""
        return is_sharded(self.parameters())

    def base_fingerprint(self) -> str:
        """Return a fingerprint of the frozen weights that adapters belong to; empty without adapters."""
        return ""

    def whole_parts(self) -> list[nn.Module]:
        """Return the networks that stay whole when the weights are sharded."""
        return []

    def configure_model(self) -> None:
        """Shard the weights, once, if the strategy has a mesh of processes for it."""
        if self._device_mesh is None or self.sharded:
            return
        if not self.entry:
            raise UserError(
                f"task={self.config.task} cannot be sharded, nor does it need to; use trainer.strategy=ddp"
            )
        shard(self, self._device_mesh["data_parallel"], self.whole_parts(), self.entry)
        if self.ema is not None:
            self.ema.begin(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its learning-rate schedule, which advances with every optimizer step."""
        optimizer, scheduler = make_optimizer(self, self.config.optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the average to the weights' devices."""
        if self.ema is not None:
            self.ema.to_parameter_devices()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make an optimizer step, then update the average (before a checkpoint of this step is written)."""
        self.rate = float(optimizer.param_groups[0]["lr"])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None and self.step_made:
            self.ema.update(self.global_step + 1)

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Return the loss of a micro-batch, and add values to log to :attr:`sums`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch."""
        loss = self.batch_loss(batch)
        self.guard.observe(batch, loss)
        self.log("train/loss", loss.detach(), prog_bar=True, logger=False)  # StepLog writes means
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradients, and skip the step when they are not finite."""
        norm = gradient_norm(self.parameters())
        self.sums.add("train/gradient_norm", norm.view(1))
        # only one rank searches for the layer, which does not work with sharded weights
        recompute = None if self.sharded else self._recompute_loss
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.step_made = self.guard.allows(norm, self.global_step, self.model, recompute, scaled=scaled)
        if not self.step_made:  # optimizers skip parameters without a gradient
            optimizer.zero_grad(set_to_none=True)

    def _recompute_loss(self, batch: Any) -> None:
        kept, self.sums = self.sums, Sums()
        try:
            with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
                self.batch_loss(batch)
        finally:
            self.sums = kept

    def validated(self, batch_idx: int, size: int) -> Tensor:
        """Return which samples of a validation batch count, ``(size,)`` bool.

        The first ``trainer.validation_samples`` do, whatever the batch size and the number of ranks; samples
        that only fill up the last batch do not.
        """
        counter = self.trainer.val_dataloaders.counter  # type: ignore[union-attr]
        total = min(self.config.trainer.validation_samples, counter.length)
        first = (batch_idx * counter.num_replicas + counter.rank) * counter.batch_size
        return first + torch.arange(size) < total

    def on_validation_epoch_end(self) -> None:
        """Log the means, labelled with the number of optimizer steps that the weights have seen."""
        totals = self.validation_sums.reduced()
        for name, total in totals.items():
            self.log(name, total[0] / total[2], prog_bar=name in self.shown)
        if "val/loss" in totals:
            self.log("val/loss_band", half_interval(totals["val/loss"]))
        self.validation_sums.clear()
        self.validated_step = max(self.global_step, self.loaded_step)
        self.log("step", float(self.validated_step))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averaged weights inside a ``with`` block (the plain ones when the average is off).

        With sharded weights, all ranks must enter it.
        """
        with nullcontext() if self.ema is None else self.ema.applied(), gathered(self):
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the average, values not logged yet and the configuration to the checkpoint."""
        checkpoint["sums"] = self.sums.reduced()
        checkpoint["config"], checkpoint["base"] = to_dict(self.config), self.base_fingerprint()
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the average, the step and values not logged yet from the checkpoint."""
        self.loaded_step = int(checkpoint["global_step"])
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and "loops" in checkpoint:
            place = checkpoint.get(type(data).__qualname__)
            if place is None:
                report(
                    "the place in the data is not kept between samples made online and a latent cache: "
                    "they come in another order, which begins anew"
                )
                place = {"samples": 0}
            batch = self.config.data.batch_size * self.trainer.world_size
            recount_batches(checkpoint, place["samples"], batch, self.config.trainer.accumulate)
        self.sums.clear()
        if self.trainer.is_global_zero:  # they are those of all ranks
            self.sums.totals = dict(checkpoint.get("sums", {}))
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])


class Sums:
    """Sums of named values over samples, independent of batches, micro-batches and ranks.

    They are in double precision, and adding does not wait for the device. ``totals`` holds, by name, the sum
    of the values, the sum of their squares, and their number.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Add values of any shape, one per sample; values that are not finite are ignored.

        ``counted``, bool of the same shape, says which values count; None counts all.
        """
        values = values.detach().double()
        kept = torch.isfinite(values)
        if counted is not None:
            kept &= counted.to(values.device)
        ones, values = kept.to(values), torch.where(kept, values, torch.zeros_like(values))
        total = torch.stack([values.sum(), (values**2).sum(), ones.sum()])
        if name in self.totals:
            self.totals[name] = self.totals[name].to(total.device)  # a checkpoint's are on the CPU
        self.totals[name] = self.totals[name] + total if name in self.totals else total

    def reduced(self) -> dict[str, Tensor]:
        """Return the totals over all ranks, on the CPU; every rank must call it.

        Totals are matched by name, since ranks may have different ones: after a restart the first rank alone
        holds what all of them had measured before.
        """
        names = list(dict.fromkeys(name for rank in from_all_ranks(list(self.totals)) for name in rank))
        if not names:
            return {}
        # on one device: totals from a checkpoint are on the CPU until values are added
        device = _device(self.totals.values())
        nothing = torch.zeros(3, dtype=torch.float64, device=device)
        stacked = torch.stack([self.totals.get(name, nothing).to(device) for name in names])
        if is_distributed():
            torch.distributed.all_reduce(stacked)
        return dict(zip(names, stacked.cpu(), strict=True))

    def means(self) -> dict[str, float]:
        """Return the mean of each name over all ranks, without names that have no sample."""
        return {name: float(total[0] / total[2]) for name, total in self.reduced().items() if total[2]}

    def clear(self) -> None:
        """Forget everything."""
        self.totals = {}


def _device(totals: Iterable[Tensor]) -> torch.device:
    """Return the device to collect totals on: NCCL needs GPU memory."""
    if is_distributed():
        if torch.distributed.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    return next((total.device for total in totals if total.device.type != "cpu"), torch.device("cpu"))


def half_interval(total: Tensor) -> float:
    """Return half the width of the 95 % interval of a mean, from a total of :meth:`Sums.reduced`."""
    values, squares, count = total.tolist()
    if count < 2:
        return float("nan")
    variance = max(squares / count - (values / count) ** 2, 0.0) * count / (count - 1)
    return NORMAL_95 * (variance / count) ** 0.5
