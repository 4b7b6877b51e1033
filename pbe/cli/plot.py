"""``pbe plot``: the curves of a training run."""

from __future__ import annotations

from pathlib import Path

from pbe.cli.arguments import options
from pbe.errors import UserError

CURVES = {"train/loss": "training loss, each logged step", "val/loss": "loss on the fixed validation grid"}
COLOURS = {"train/loss": "0.75", "val/loss": "tab:blue"}


@options
class PlotSettings:
    """Options of ``pbe plot``."""

    out: Path
    """image to write (.png, .svg or .pdf)"""


def plot(run: Path, /, *, settings: PlotSettings) -> None:
    """Draw training and validation loss of a run into one image.

    pbe plot outputs/toy/diffusion --out curve.png

    Args:
        run: folder of a run, with metrics.csv
    """
    path = run / "metrics.csv"
    if not path.is_file():
        raise UserError(f"'{run}' is not a training run: it has no metrics.csv")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from pbe.training.monitoring.loggers import read_curve

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, label in CURVES.items():
        points = read_curve(path, name)
        axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=label)
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(settings.out, dpi=120)
    except ValueError as error:
        raise UserError(f"'{settings.out}': {str(error).splitlines()[0]}") from error
    print(settings.out)
