"""``pbe demo``: the whole project in a few minutes."""

from __future__ import annotations

import sys
import traceback
from dataclasses import replace
from pathlib import Path

from pbe.cli.arguments import options
from pbe.evaluation.demo import DemoSettings
from pbe.resources import find_model, model_name


@options
class DemoOptions(DemoSettings):
    """Options of ``pbe demo``."""


def demo(*, settings: DemoOptions = DemoOptions()) -> int:
    """Render, train, edit and score on the toy world, and write a page that shows it all.

    pbe demo --out outputs/demo
    """
    from pbe.evaluation.demo.stages import StageError, run

    try:
        model = Path(find_model(str(settings.model)))
        usual = "toy-fast" if model_name(model) == "toy" else "none"
        run(replace(settings, model=model, student=find_model(settings.student or usual)))
    except StageError as error:
        traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
