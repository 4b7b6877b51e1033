"""The adapters of a pipeline: loaded, weighed, combined, merged and taken away."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from pathlib import Path

from pbe.checkpoints.adapters import ADAPTER_NAME, find_adapter, open_adapter
from pbe.config import UNetConfig
from pbe.diffusion.solvers import FEW_STEPS_SOLVER, SolverChoice
from pbe.errors import EditTypeError, EditValueError
from pbe.files import expand_home
from pbe.models import LatentDiffusion
from pbe.models.adapters import adapters_of, load_adapter, merge_adapters, remove_adapter
from pbe.models.int8 import is_quantised


class AdapterSettings:
    """The part of a pipeline that puts adapters beside the weights of its networks."""

    model: LatentDiffusion
    _choice: SolverChoice
    _distilled: tuple[str, UNetConfig, SolverChoice] | None = None  # by which adapter, and what was before

    @property
    def _few_steps(self) -> int:
        """The number of steps that the model is meant for, by its weights or an adapter; 0: any."""
        return self.model.config.unet.few_steps

    @property
    def adapters(self) -> dict[str, float]:
        """Names of the adapters that are loaded, with their scales."""
        return {adapter.name: adapter.factor for _, adapter in adapters_of(self.model)}

    def load_adapter(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Use an adapter beside the weights; several adapters add up.

        A distilled adapter brings its solver, number of steps and guidance scale along.

        Args:
            path: its file, or the folder of the run that trained it.
            scale: its strength; 1 is as trained, 0 has no effect.
            name: what to call it from now on; None takes the name of the file or of the run's folder.

        Returns:
            The name.
        """
        _check_scale(scale)
        file = find_adapter(Path(expand_home(str(path))))
        name = name or (file.resolve().parent.name if file.name == ADAPTER_NAME else file.stem)
        if name in self.adapters:
            raise EditValueError(f"an adapter '{name}' is loaded already; give this one another name")
        adapter = open_adapter(file)
        # of a weight in 8 bits the state has another name
        shapes = {key.removesuffix("_int8"): each.shape for key, each in self.model.state_dict().items()}
        adapter.check_fit(shapes, "this model")
        before = self.model.config.unet
        unet = adapter.adapted_unet(before)
        if unet is not before:
            _check_distilled(name, scale)
        load_adapter(self.model, adapter.read(), adapter.alpha, float(scale), name)
        if unet is not before:
            self._distilled = (name, before, self._choice)
            self._become(unet, FEW_STEPS_SOLVER)
        return name

    def _become(self, unet: UNetConfig, choice: SolverChoice) -> None:
        """Run the model as one whose UNet has these sizes is run."""
        self.model.unet.config = unet
        self.model.config = replace(self.model.config, unet=unet)
        self._choice = choice

    def set_adapter_scale(self, name: str, scale: float) -> None:
        """Change an adapter's strength; 0 turns it off and keeps it loaded."""
        _check_scale(scale)
        self._check_name(name)
        if self._distilled is not None and self._distilled[0] == name:
            _check_distilled(name, scale)
        for _, adapter in adapters_of(self.model, name):
            adapter.factor = float(scale)

    def unload_adapter(self, name: str | None = None) -> None:
        """Remove an adapter, or all of them (None); the weights are then exactly what they were."""
        if name is not None:
            self._check_name(name)
        remove_adapter(self.model, name)
        if self._distilled is not None and name in (None, self._distilled[0]):
            self._become(*self._distilled[1:])
            self._distilled = None

    def merge_adapters(self) -> None:
        """Add all adapters to the weights permanently, so that they cost no time in an edit."""
        if is_quantised(self.model):
            raise EditValueError(
                "adapters cannot be merged into weights in 8 bits; load the model without int8"
            )
        merge_adapters(self.model)
        self._distilled = None

    def _check_name(self, name: str) -> None:
        if name not in self.adapters:
            loaded = ", ".join(self.adapters) or "none"
            raise EditValueError(f"no adapter '{name}' is loaded; there are: {loaded}")


def _check_distilled(name: str, scale: float) -> None:
    if not scale:
        raise EditValueError(
            f"scale is 0, but '{name}' is what makes this a few-step model; "
            f"unload_adapter('{name}') turns it off"
        )


def _check_scale(scale: object) -> None:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise EditTypeError(f"scale: {type(scale).__name__}; it must be a number")
    if not math.isfinite(scale):
        raise EditValueError(f"scale is {scale}; it must be a finite number")
