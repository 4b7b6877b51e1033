"""The names that a pipeline of diffusers has, for people and programs that come from there.

The package itself is not used: a scheduler that is assigned is read by its configuration.
"""

from __future__ import annotations

import difflib
import inspect
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Self

from torch import nn
from tqdm import tqdm

from pbe.checkpoints.diffusers.format import write_index, write_preprocessor, write_scheduler
from pbe.checkpoints.settings import Usage
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.diffusers_inputs import OURS, ReadOnly, Scheduler, nearest, read_arguments, solver_of
from pbe.editing.loading import Hub, upload
from pbe.editing.safety import SafetyChecker, usable_checker
from pbe.editing.settings import get_conventions
from pbe.errors import EditAttributeError, EditTypeError, EditValueError
from pbe.models import LatentDiffusion

PARTS = "PaintByExample(**pipe.components) makes a pipeline that shares parts"
# What diffusers' class has and a pipeline here has not, by what there is instead.
INSTEAD = {
    "a step inside a call here; pipe.model has the networks' own methods": (
        "check_inputs decode_latents image_processor prepare_extra_step_kwargs prepare_latents "
        "prepare_mask_latents"
    ),
    "a model's files are written by save_pretrained and read by from_pretrained": (
        "config_name extract_init_dict from_config get_config_dict ignore_for_config load_config "
        "register_for_auto_class save_config to_json_file to_json_string"
    ),
    PARTS: "register_modules register_to_config",
    "FreeU changes the UNet's skips, which are those it was trained with here": "disable_freeu enable_freeu",
    "PyTorch's own memory-efficient attention is always used": "set_use_memory_efficient_attention_xformers",
    "all networks lie on pipe.device": "hf_device_map",
    "disable_cpu_offload() ends the offloading": "maybe_free_model_hooks",
    "enable_model_cpu_offload keeps idle networks on the CPU": "enable_group_offload",
    "enable_model_cpu_offload moves each network when it is needed": "model_cpu_offload_seq",
    "output_type='pil' gives PIL images": "numpy_to_pil",
    "pipe.model.parameters() are the weights": "parameters",
    "pipe.safety_checker(images) looks at images": "run_safety_checker",
    "pipe.scheduler.compatibles lists what can be assigned to pipe.scheduler": "has_compatibles",
    "pipe.to(device) moves all networks": "reset_device_map",
    "queries, keys and values are projected separately": "fuse_qkv_projections unfuse_qkv_projections",
    "the exemplar is the condition, and exemplar_encoder encodes it; there is no text": (
        "text_encoder tokenizer"
    ),
}
NOT_HERE = {name: reason for reason, names in INSTEAD.items() for name in names.split()}
TEXT = "the exemplar is the condition; there is no text"
# Arguments of other pipelines' calls, and why they have no place here.
NOT_IN_A_CALL = {
    "callback_on_step_end": "callback=f gets the step, the timestep and the latents, every callback_steps",
    "prompt": TEXT,
    "prompt_embeds": TEXT + ", and exemplar_embeds is the condition itself",
    "negative_prompt_embeds": TEXT,
    "strength": "the masked region always starts from noise",
}
ATTRIBUTES = ("conventions", "model", "noise_schedule", "safety_checker", "watermark")


class DiffusersNames:
    """The part of a pipeline that goes by diffusers' names, and says what there is in place of others."""

    model: LatentDiffusion
    safety_checker: Any
    _choice: SolverChoice
    _bar: dict[str, Any]
    _name_or_path = ""

    usage: property  # of the pipeline
    components: property
    save_pretrained: Callable[..., None]

    @property
    def vae(self) -> nn.Module:
        """The autoencoder."""
        return self.model.autoencoder

    @property
    def image_encoder(self) -> nn.Module:
        """The exemplar encoder."""
        return self.model.exemplar_encoder

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position along a side."""
        return self.model.autoencoder.downsampling

    @property
    def feature_extractor(self) -> ReadOnly:
        """How diffusers' conventions crop exemplars: what ``preprocessor_config.json`` holds."""
        usage: Usage = self.usage
        return ReadOnly(write_preprocessor(self.model.config, usage.preprocessor))

    @property
    def scheduler(self) -> Scheduler:
        """The solver as diffusers' schedulers have it; assign one, and its solver and settings are taken."""
        usage: Usage = self.usage
        return Scheduler(write_scheduler(self.model.config, usage.scheduler_config()))

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """Take the solver of a scheduler for the calls that name none."""
        self._choice = solver_of(scheduler, self.model)

    @property
    def config(self) -> ReadOnly:
        """What ``model_index.json`` says of the pipeline in diffusers' layout."""
        checker = isinstance(self.safety_checker, SafetyChecker)
        index = write_index(self.scheduler.config, safety_checker=checker)
        return ReadOnly(index | {"_name_or_path": self._name_or_path})

    @property
    def name_or_path(self) -> str:
        """Where the model came from; empty for one that was not loaded."""
        return self._name_or_path

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Set tqdm's arguments for the bar, in place of earlier ones: ``disable=True`` turns it off."""
        known = [*inspect.signature(tqdm.__init__).parameters][1:-1]  # neither self nor **kwargs
        for name in settings:
            if name not in known:
                raise EditTypeError(
                    f"the progress bar has no setting '{name}'; there are: {', '.join(known)}"
                )
        self._bar = settings

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> tqdm[Any]:
        """Return a bar with the settings of this pipeline's."""
        if iterable is None and total is None:
            raise EditValueError("progress_bar needs an iterable or a total")
        return tqdm(iterable, total=total, **self._bar)

    @classmethod
    def from_pipe(cls, pipeline: Any, **parts: Any) -> Self:
        """Return a pipeline that shares the parts of another; arguments take the place of some."""
        if not isinstance(pipeline, DiffusersNames):
            raise EditTypeError(f"from_pipe: {type(pipeline).__name__}; it must be a PaintByExample")
        own = {OURS.get(name, name): part for name, part in parts.items()}
        made = cls(**(pipeline.components | own))
        made._name_or_path = pipeline._name_or_path
        return made

    @classmethod
    def download(
        cls,
        pretrained_model_name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **others: Any,
    ) -> Path:
        """Fetch what :meth:`from_pretrained` would, and return the folder; arguments are as there.

        A path that exists is returned as it is; ``others`` are ``variant``, ``use_safetensors``,
        ``force_download``.
        """
        theirs = read_arguments(others)
        hub = Hub(revision, cache_dir, local_files_only, token, theirs.files, theirs.force_download)
        return hub.find(pretrained_model_name)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        **saving: Any,
    ) -> str:
        """Save the model and upload it to a repository of the Hugging Face Hub; return the commit's address.

        Args:
            repo_id: ``owner/name``, made when missing.
            commit_message: of the commit.
            private: for a repository that is made; None is the account's default.
            token: with the right to write; None is the one of ``hf auth login``.
            create_pr: open a pull request instead of writing to ``main``.
            saving: arguments of :meth:`save_pretrained`, such as ``layout``.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)
            message = commit_message or "Upload PaintByExample"
            return upload(Path(folder), repo_id, message, private=private, token=token, create_pr=create_pr)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        raise EditAttributeError(f"a pipeline has no '{name}'{self._instead(name)}")

    def __setattr__(self, name: str, value: Any) -> None:
        found = inspect.getattr_static(type(self), name, None)
        if isinstance(found, property) and found.fset is None:
            raise EditAttributeError(f"'{name}' cannot be assigned; {PARTS} and takes others in their place")
        if name in ("model", "noise_schedule") and name in vars(self):
            raise EditAttributeError(f"'{name}' cannot be assigned; make another PaintByExample of it")
        if callable(found) and name not in ATTRIBUTES:
            raise EditAttributeError(f"'{name}' is a method and cannot be assigned; call it")
        if found is None and name not in ATTRIBUTES and not name.startswith("_"):
            raise EditAttributeError(f"a pipeline has no '{name}' to assign{self._instead(name)}")
        object.__setattr__(self, name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """Return the value of an attribute as it is kept."""
        if name == "conventions":
            return get_conventions(value).name
        if name == "safety_checker":
            return usable_checker(value)
        if name == "watermark" and not isinstance(value, bool):
            raise EditTypeError(f"watermark: {type(value).__name__}; it must be True or False")
        return value

    def _refuse_arguments(self, others: Iterable[str]) -> None:
        """Refuse arguments that the call does not have, such as those of diffusers' other pipelines."""
        known = [*inspect.signature(type(self).__call__).parameters][1:-1]
        for name in others:
            reason = f": {NOT_IN_A_CALL[name]}" if name in NOT_IN_A_CALL else nearest(name, known)
            raise EditTypeError(f"the call has no argument '{name}'{reason}")

    def _instead(self, name: str) -> str:
        """Return the end of an error: what there is in place of a name that a pipeline does not have."""
        if name in NOT_HERE:
            return f": {NOT_HERE[name]}"
        if name in inspect.signature(type(self).__call__).parameters:
            return f": it is an argument of the call, pipe(..., {name}=...)"
        known = [*ATTRIBUTES, *(each for each in dir(type(self)) if not each.startswith("_"))]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(ATTRIBUTES)}, solver"
