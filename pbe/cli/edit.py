"""``pbe edit`` and ``sample.py``: paint an exemplar into the masked part of images."""

from __future__ import annotations

import logging
import warnings

from pbe.cli.arguments import options
from pbe.editing.settings import EditCommand

NOISY = ("PIL", "torch", "timm", "open_clip")


@options
class EditOptions(EditCommand):
    """Options of ``pbe edit``."""


def edit(*, settings: EditOptions) -> None:
    """Paint an exemplar into the masked part of an image.

    pbe edit --model M --image I --mask M --exemplar E --out FOLDER
    pbe edit --model M --pairs FILE --out FOLDER

    Each edit is written to --out as NAME_SEED.png, with every setting to repeat it in NAME_SEED.json; each
    image also gets a NAME_SEED_grid.png for comparison. An entry of a --pairs file has image, mask and
    exemplar (paths relative to the file) and optionally name and seed. See docs/sampling.md.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs errors that it then raises
    with warnings.catch_warnings():
        for package in NOISY:  # what their users can do nothing about; what matters here is an error
            warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        _edit(settings.checked())


def _edit(command: EditCommand) -> None:
    """Check everything, then load the model and edit."""
    from pbe.editing.batch.jobs import check_files, check_format, collect_jobs, output_folder
    from pbe.files import make_folder

    jobs = collect_jobs(command)
    folder = output_folder(command, jobs)
    checked = check_files(jobs, quiet=command.quiet)
    check_format(command, checked[0].size)
    make_folder(folder)
    from pbe.editing.batch.runner import edit_all  # imports torch, which takes seconds

    edit_all(checked, command)
