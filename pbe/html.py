"""HTML pages that hold their images and need no network: templates, ``data:`` addresses, writing."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from pbe.files import make_folder, write_output


@dataclass(frozen=True)
class Tile:
    """An image, uint8 ``h w 3``, with its caption."""

    caption: str
    image: np.ndarray


def data_uri(image: np.ndarray) -> str:
    """Return an image, uint8 ``h w 3``, as a PNG in a ``data:`` address."""
    return _data_uri(image, "png", optimize=True)


def small_uri(image: np.ndarray) -> str:
    """Return an image, uint8 ``h w 3``, as a WebP of high quality: a tenth of the PNG of an enlarged one."""
    return _data_uri(image, "webp", quality=90)


def _data_uri(image: np.ndarray, kind: str, **settings: int | bool) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **settings)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def render_page(template: Path, **values: Any) -> str:
    """Return the HTML of a Jinja template; every text is escaped.

    A template may include ``page_style.css``, the pages' common style, and use the filters ``data_uri`` and
    ``small_uri``.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "small_uri": small_uri}
    return environment.get_template(template.name).render(**values)


def write_html(page: str, path: Path) -> None:
    """Write a page, whole or not at all, into a folder that is made where it is missing."""
    make_folder(path.parent)
    write_output(path, page)
