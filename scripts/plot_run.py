"""Plot the curves of training runs: ``python scripts/plot_run.py outputs/toy/diffusion --out curve.png``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pbe.cli.parser import Parser, run_command
from pbe.errors import UserError
from pbe.training.monitoring.loggers import read_curve

CURVES = {"train/loss": "training loss, each logged step", "val/loss": "loss on the fixed validation grid"}
COLOURS = {"train/loss": "0.75", "val/loss": "tab:blue"}


def main(argv: list[str] | None = None) -> int:
    """Draw training and validation loss of a run into one picture. Returns the exit code."""

    def body() -> None:
        parser = Parser(description=(__doc__ or "").splitlines()[0])
        parser.add_argument("run", type=Path, help="folder of a run, with metrics.csv")
        parser.add_argument("--out", type=Path, required=True, help="picture to write (.png, .svg or .pdf)")
        options = parser.parse_args(argv)
        plot(options.run, options.out)
        print(options.out)

    return run_command(body)


def plot(run: Path, out: Path) -> None:
    """Draw the loss curves of ``run`` into ``out``.

    Raises:
        UserError: the run has no metrics, or the picture's format is unknown.
    """
    path = run / "metrics.csv"
    if not path.is_file():
        raise UserError(f"'{run}' is not a training run: it has no metrics.csv")
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, label in CURVES.items():
        points = read_curve(path, name)
        axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=label)
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise UserError(f"'{out}': {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
