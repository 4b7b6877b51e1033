"""Base class of the training tasks: optimizer, moving average and their place in the checkpoint."""

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
from pbe.training.resume.files import recount_batches

NORMAL_95 = 1.96  # half-width of a 95 % interval, in standard errors


class BaseTask(pl.LightningModule):
    """A Lightning module with this project's optimizer and moving average.

    Subclasses build their networks in ``__init__``, freeze what is not trained, and call
    :meth:`start_average` last.
    """

    model: nn.Module
    shown: tuple[str, ...] = ("val/loss",)  # of a validation, beside the progress bar
    adapted: bool = False  # adapters are trained, beside frozen weights
    entry: str = ""  # the method through which a step uses all weights; empty: they cannot be sharded

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.ema: Ema | None = None  # the moving average, unless it is off
        self.sums = Sums()  # of what training has measured since the last row of the log
        self.validation_sums = Sums()  # of what the current validation has measured
        self.guard = Guard(config.trainer)  # checks every step before it is made
        self.step_made = True  # the last step was not skipped
        self.rate = 0.0  # of learning, in the last optimizer step
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
        """Return a fingerprint of the weights that adapters are trained beside, empty without adapters."""
        return ""

    def whole_parts(self) -> list[nn.Module]:
        """Return the networks that are kept whole where the weights are sharded."""
        return []

    def configure_model(self) -> None:
        """Cut the weights into shards, once, where the strategy has a mesh of processes for that."""
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
        """Return the optimizer and its schedule, stepped every optimizer step."""
        optimizer, scheduler = make_optimizer(self, self.config.optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the average to where the weights went."""
        if self.ema is not None:
            self.ema.to_parameter_devices()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make an optimizer step, then move the average (before any checkpoint of this step is written)."""
        self.rate = float(optimizer.param_groups[0]["lr"])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None and self.step_made:
            self.ema.update(self.global_step + 1)

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Return the loss of a micro-batch, and add what is worth logging to :attr:`sums`."""

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
        # one rank alone searches for the layer, and cannot use sharded weights
        recompute = None if self.sharded else self._recompute_loss
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.step_made = self.guard.allows(norm, self.global_step, self.model, recompute, scaled=scaled)
        if not self.step_made:  # an optimizer passes over parameters without a gradient
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

        ``trainer.validation_samples`` do, whatever the size of the batches and the number of ranks;
        what fills up the last batch does not.
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

        All ranks have to enter it where the weights are sharded.
        """
        with nullcontext() if self.ema is None else self.ema.applied(), gathered(self):
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the average, what is not logged yet and the configuration into the checkpoint."""
        checkpoint["sums"] = self.sums.reduced()
        checkpoint["config"], checkpoint["base"] = to_dict(self.config), self.base_fingerprint()
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average, the step and what is not logged yet out of the checkpoint."""
        self.loaded_step = int(checkpoint["global_step"])
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and "loops" in checkpoint:
            place = checkpoint.get(type(data).__qualname__, {"samples": 0})
            batch = self.config.data.batch_size * self.trainer.world_size
            recount_batches(checkpoint, place["samples"], batch, self.config.trainer.accumulate)
        self.sums.clear()
        if self.trainer.is_global_zero:  # they are those of all ranks
            self.sums.totals = dict(checkpoint.get("sums", {}))
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])


class Sums:
    """Adds up named values sample by sample, whatever batches, micro-batches and ranks they come in.

    It does so in double precision and without waiting for the device. ``totals`` holds the sum of the values,
    of their squares, and the number of them, by name.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Add values of any shape, one for each sample; those that are not finite are left out.

        ``counted``, bool of the same shape, says which of them count; None counts all.
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
        """Return the totals over all ranks, on the CPU; every rank has to call it.

        Ranks are put together by name, whatever they have measured and in which order: after a restart the
        first one alone holds what all of them had measured before.
        """
        names = list(dict.fromkeys(name for rank in from_all_ranks(list(self.totals)) for name in rank))
        if not names:
            return {}
        # in one place: what a checkpoint held is on the CPU until it is added to
        device = _device(self.totals.values())
        nothing = torch.zeros(3, dtype=torch.float64, device=device)
        stacked = torch.stack([self.totals.get(name, nothing).to(device) for name in names])
        if is_distributed():
            torch.distributed.all_reduce(stacked)
        return dict(zip(names, stacked.cpu(), strict=True))

    def means(self) -> dict[str, float]:
        """Return the mean of each name over all ranks; names without a sample are left out."""
        return {name: float(total[0] / total[2]) for name, total in self.reduced().items() if total[2]}

    def clear(self) -> None:
        """Forget everything."""
        self.totals = {}


def _device(totals: Iterable[Tensor]) -> torch.device:
    """Return where totals are put together: NCCL takes GPU memory only."""
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
