"""Settings of the server: what it serves, to whom, and how much of everything. No torch here.

Annotations are evaluated (no ``from __future__``): a command line reads them in a class of another module.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pbe.editing.settings import Dtype, check_count, check_number, existing_path, option_name
from pbe.errors import UserError
from pbe.resources import model_name

PASSWORD = "PBE_PASSWORD"
COUNTS = ("port", "max_megabytes", "max_megapixels", "max_steps", "max_images", "batch_size", "max_queue")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a model is served."""

    model: str = field(default="toy", metadata={"group": "Model"})
    """folder, checkpoint, owner/name on the Hub, toy or toy-fast (the models that ship)"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "fp32"
    """type of the weights"""
    host: str = field(default="127.0.0.1", metadata={"group": "Address"})
    """address to listen on; 0.0.0.0 lets other machines in"""
    port: int = 7860
    """port to listen on"""
    user: str | None = None
    """require this name and a password"""
    password: str | None = field(default=None, repr=False)
    """that password; better given in the environment variable PBE_PASSWORD, which other users cannot see"""
    max_megabytes: int = field(default=20, metadata={"group": "Limits"})
    """largest file that is accepted"""
    max_megapixels: int = 40
    """largest image, in millions of pixels"""
    max_steps: int = 200
    """largest number of steps of an edit"""
    max_images: int = 8
    """largest number of edits of one request: images times exemplars"""
    batch_size: int = 8
    """edits with equal settings and sizes that run at once, rounded down to a power of two"""
    max_queue: int = 64
    """number of edits that may wait; further ones are refused"""
    keep_minutes: float = 30.0
    """minutes after which uploads and results are deleted"""
    export: str | None = field(default=None, metadata={"group": "Publishing"})
    """write a folder for a Hugging Face Space instead of serving"""

    def checked(self) -> Self:
        """Return the settings with every value checked."""
        found: dict[str, Any] = {name: check_count(option_name(name), getattr(self, name)) for name in COUNTS}
        if self.port > 65535:
            raise UserError(f"--port is {self.port}; it must be at most 65535")
        found["keep_minutes"] = check_number("--keep-minutes", self.keep_minutes)
        existing_path(self.model, "--model")
        found["password"] = self.password or os.environ.get(PASSWORD)
        if self.user is not None and not found["password"]:
            raise UserError(f"--user needs a password: set {PASSWORD} or give --password")
        if self.user is None and found["password"]:
            raise UserError("a password needs a name: give --user")
        return replace(self, **found)

    @property
    def model_name(self) -> str:
        """What the page and its records call the model; a folder that does not ship loses its place."""
        path = existing_path(self.model)
        return self.model if path is None else Path(model_name(path)).name
