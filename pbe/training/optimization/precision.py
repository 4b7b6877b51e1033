"""How numbers are kept in training: Lightning's precisions, made to fit this project's batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision, Precision

from pbe.config import TrainerConfig


class WholeHalf(HalfPrecision):
    """All weights in bfloat16, frozen ones included; the networks' inputs are converted where they are used.

    Latents, noise, targets and losses stay float32: Lightning would convert the batch, which is uint8 or a
    frozen dataclass, and everything that is made in a step.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Leave torch's default type as it is."""
        yield

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is."""
        return data


def precision_plugin(options: TrainerConfig, *, cpu: bool) -> Precision | None:
    """Return the plugin of a precision, or None where Lightning's own is right.

    Args:
        options: name the precision.
        cpu: training runs there, where Lightning would take bf16-mixed in place of 16-mixed.
    """
    if options.precision == "bf16-true":
        return WholeHalf()
    if options.precision == "16-mixed" and cpu:
        return MixedPrecision("16-mixed", "cpu")
    return None
