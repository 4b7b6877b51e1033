"""``pbe serve --export``: a folder that can be pushed as a Hugging Face Space."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path

from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import CONFIG_NAME
from pbe.checkpoints.saving import convert
from pbe.editing.settings import existing_path
from pbe.errors import UserError
from pbe.files import new_folder
from pbe.resources import TOY_MODEL, packaged
from pbe.web.settings import ServeSettings

EXTRA = re.compile(r"extra == ['\"](\w+)['\"]")
NAME = re.compile(r"([\w.-]+)(\[[\w,]+\])?")
APP = '''"""Serves the page; Spaces run this file."""

import sys

from pbe.cli.main import main

sys.exit(main(["serve", "--model", "{model}", "--host", "0.0.0.0", "--port", "7860"]))
'''
README = """---
title: Paint by Example
emoji: 🖌️
colorFrom: indigo
colorTo: pink
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
---

# Paint by Example

Mask a part of an image, show an exemplar, and it is painted in. `python app.py` runs the page here; its API
is described at `/docs`. Written by `pbe serve --export`.
"""
LARGE = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.ckpt filter=lfs diff=lfs merge=lfs -text\n"


def export_space(settings: ServeSettings) -> None:
    """Write the folder that ``settings.export`` names: package, model, examples and what Spaces read."""
    target = Path(str(settings.export))
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise UserError(f"--export '{target}' is there already; name a new folder")
    pins = requirements()
    with new_folder(target) as folder:
        package = Path(__file__).resolve().parents[1]
        shutil.copytree(package, folder / "pbe", ignore=shutil.ignore_patterns("__pycache__", "_resources"))
        resources = folder / "pbe/_resources"
        shutil.copytree(packaged("data/examples"), resources / "data/examples")
        model = _copy_model(settings.model, folder)
        (folder / "app.py").write_text(APP.format(model=model))
        (folder / "requirements.txt").write_text("\n".join(pins) + "\n")
        gradio = importlib.metadata.version("gradio")
        (folder / "README.md").write_text(README.format(gradio=gradio))
        (folder / ".gitattributes").write_text(LARGE)
    print(f"wrote {target}: push it to https://huggingface.co/spaces, with git-lfs for the weights")


def _copy_model(name: str, folder: Path) -> str:
    """Copy a model that lies here; return what it is called from there. One of the Hub stays there."""
    place = existing_path(name)
    if place is None:
        return name
    if place == packaged(TOY_MODEL):
        shutil.copytree(place, folder / "pbe/_resources" / TOY_MODEL)
        shutil.copy(packaged("data/toy/LICENCES.md"), folder / "pbe/_resources/data/toy/LICENCES.md")
        return "toy"
    if (place / CONFIG_NAME).is_file():  # whole, where it shares parts with another
        opened = open_checkpoint(place)
        convert(opened, folder / "model", opened.layout)
        return "model"
    if place.is_dir():
        shutil.copytree(place, folder / "model")
        return "model"
    (folder / "model").mkdir()
    shutil.copy(place, folder / "model" / place.name)
    return f"model/{place.name}"


def requirements() -> list[str]:
    """Return what serving needs, in the versions installed here; the Space has Gradio itself."""
    pins = []
    for line in importlib.metadata.metadata("pbe").get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        extra = EXTRA.search(marker)
        found = NAME.match(requirement.strip())
        assert found is not None  # metadata are well-formed
        name, bracket = found.groups()
        if name != "gradio" and (extra is None or extra[1] == "web"):
            version = importlib.metadata.version(name).partition("+")[0]
            pins.append(f"{name}{bracket or ''}=={version}")
    return pins
