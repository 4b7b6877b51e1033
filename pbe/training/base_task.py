"""What both training tasks share: optimizer, moving average and their place in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler

from pbe.config import Config
from pbe.training.ema import Ema
from pbe.training.optimizer import make_optimizer


class BaseTask(pl.LightningModule):
    """A Lightning module with this project's optimizer and moving average.

    Subclasses build their networks in ``__init__``, freeze what is not trained, and call
    :meth:`start_average` last.
    """

    ema: Ema | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.ema = None

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

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average after each optimizer step (not after each micro-batch)."""
        if self.ema is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.ema.update(self.global_step)

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
        """Take the average out of the checkpoint."""
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    def on_after_backward(self) -> None:
        """Refuse to go on with a loss that is not a number."""
        loss = self.trainer.callback_metrics.get("train/loss")
        if loss is not None and not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)} at step {self.global_step}")
