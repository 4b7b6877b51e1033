"""What both training tasks share: optimizer, moving average and their place in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities.types import OptimizerLRScheduler

from pbe.config import Config
from pbe.errors import UserError
from pbe.training.ema import Ema
from pbe.training.optimizer import make_optimizer


class BaseTask(pl.LightningModule):
    """A Lightning module with this project's optimizer and moving average.

    Subclasses build their networks in ``__init__``, freeze what is not trained, and call
    :meth:`start_average` last.

    Attributes:
        ema: the moving average, or None when it is off.
        loaded_step: optimizer step of the checkpoint that was loaded, else 0.
        validated_step: optimizer step of the last validation, -1 before any.
    """

    ema: Ema | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.ema = None
        self.loaded_step = 0
        self.validated_step = -1

    def start_average(self) -> None:
        """Begin the moving average of the trainable parameters, unless the decay is 0 (off)."""
        if self.config.optimizer.ema_decay > 0:
            self.ema = Ema(self, self.config.optimizer.ema_decay)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule, stepped every optimizer step."""
        optimizer, scheduler = make_optimizer(self, self.config.optimizer, self.config.trainer.max_steps)
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
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(self.global_step + 1)

    def on_validation_epoch_end(self) -> None:
        """Label the validation with the number of optimizer steps that its weights have seen."""
        self.validated_step = max(self.global_step, self.loaded_step)
        self.log("step", float(self.validated_step))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averaged weights inside a ``with`` block (the plain ones when the average is off)."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the average into the checkpoint."""
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average and the step out of the checkpoint."""
        self.loaded_step = int(checkpoint["global_step"])
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    def on_after_backward(self) -> None:
        """Refuse to go on with a loss that is not a number."""
        loss = self.trainer.callback_metrics.get("train/loss")
        if loss is not None and not torch.isfinite(loss):
            raise UserError(
                f"the loss is {float(loss)} at step {self.global_step}; "
                "lower optimizer.learning_rate, or use trainer.precision=32-true"
            )
