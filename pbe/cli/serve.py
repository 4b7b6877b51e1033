"""``pbe serve``: the web page, and the API behind it."""

from __future__ import annotations

from pbe.cli.arguments import options
from pbe.web.settings import ServeSettings


@options
class ServeOptions(ServeSettings):
    """Options of ``pbe serve``."""


def serve(*, settings: ServeOptions = ServeOptions()) -> None:
    """Serve a web page for editing images, with an API for scripts.

    pbe serve
    pbe serve --model FOLDER --device cuda --host 0.0.0.0 --user NAME

    The page is at http://127.0.0.1:7860, the documentation of the API at /docs. Needs the extra web:
    pip install "pbe[web]". See docs/web.md.
    """
    settings = settings.checked()
    if settings.export is not None:
        from pbe.web.space import export_space

        export_space(settings)
        return
    from pbe.web.serving import serve as run

    run(settings)
