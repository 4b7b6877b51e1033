"""Where a pipeline's networks lie, and the levers that trade time for memory."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from torch import nn

from pbe.editing.settings import check_count
from pbe.errors import EditTypeError, EditValueError, UserError, first_line, warn_once
from pbe.files import expand_home
from pbe.models import LatentDiffusion
from pbe.models.attention import set_attention_slicing
from pbe.models.autoencoder import AutoencoderKL
from pbe.models.layers import compile_network

COMPILED = "~/.cache/pbe/compiled"
PARTS = ("exemplar_encoder", "autoencoder", "unet")


def usable_device(device: str | torch.device, named: str = "device", *, empty: bool = False) -> torch.device:
    """Return a device that tensors can be made on, with its number; errors call the argument ``named``.

    ``empty`` allows ``meta``, on which tensors hold no numbers.
    """
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta" and not empty:
            raise NotImplementedError("it holds no numbers")
        return found
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = first_line(error)
        if reason.startswith("Expected one of"):  # a list of every kind of device that torch has a name for
            reason = "there is no such device; name cpu, cuda, cuda:1 or mps"
        raise UserError(f"{named} '{device}' cannot be used here: {reason}") from error


class Offload:
    """Keeps the networks of a model on the CPU, but for the one at work, which it brings to ``device``.

    An edit uses exemplar encoder, autoencoder, UNet and autoencoder, in this order, so that weights travel
    four times an edit, not with every step. Nothing changes in the results. Inputs are expected on ``device``
    (``model.device`` tells), as ever, and parts must be used through the model's own methods
    (``encode_images``, ``predict``, ...), as the pipeline does.
    """

    def __init__(self, model: LatentDiffusion, device: torch.device | str) -> None:
        # weights report the number of their GPU, so that 'cuda' alone would equal none of them
        self.model, self.device = model, usable_device(device, "CPU offload: device", empty=True)
        if self.device.type == "cpu":
            raise UserError(
                "CPU offload needs an accelerator to run on, such as cuda; this is the CPU itself"
            )
        model.before_use = self.fetch
        model.run_on = self.device
        for part in PARTS:
            self._move(part, torch.device("cpu"))

    def fetch(self, part: str) -> None:
        """Bring a part to the accelerator, after the one that is there has left it."""
        for other in PARTS:
            if other != part:
                self._move(other, torch.device("cpu"))
        self._move(part, self.device)

    def remove(self, device: torch.device | str | None = None) -> None:
        """End it: all parts go to ``device`` (None: where they ran) and stay there."""
        self.model.before_use = None
        self.model.run_on = None
        self.model.to(self.device if device is None else device)

    def _move(self, part: str, device: torch.device) -> None:
        module = self.model.get_submodule(part)
        if next(module.parameters()).device != device:
            module.to(device)


TARGETS = (str, int, torch.device, torch.dtype, torch.Tensor, type(None))
NO_TARGET = "the pipeline cannot be moved: to() takes a device, a floating-point torch.dtype, or both"


class MemorySettings:
    """The part of a pipeline that gives access to its networks, moves them and limits their memory."""

    model: LatentDiffusion
    safety_checker: Any
    _offload: Offload | None

    @property
    def unet(self) -> nn.Module:
        """The noise predictor."""
        return self.model.unet

    @property
    def autoencoder(self) -> nn.Module:
        """Images to latents and back."""
        return self.model.autoencoder

    @property
    def exemplar_encoder(self) -> nn.Module:
        """Exemplars to conditions."""
        return self.model.exemplar_encoder

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; latents are kept in float32 whatever it is."""
        return self.model.dtype

    def to(self, *args: Any, silence_dtype_warnings: bool = False, **kwargs: Any) -> Self:
        """Move and cast the networks in place, as ``torch.nn.Module.to`` does; return the pipeline.

        Args:
            args: device, type, or both in this order.
            silence_dtype_warnings: there are none; accepted as in diffusers.
            kwargs: ``device`` and ``dtype``, or diffusers' older ``torch_device`` and ``torch_dtype``.
        """
        if self._offload is not None:
            raise UserError(
                "idle parts are being offloaded; call disable_cpu_offload() before moving the pipeline"
            )
        older = {"torch_device": "device", "torch_dtype": "dtype"}
        kwargs = {older.get(name, name): value for name, value in kwargs.items()}
        given = [*args, *kwargs.values()]
        if not given or len(args) > 2 or not all(isinstance(each, TARGETS) for each in given):
            raise EditTypeError(NO_TARGET)
        checker = [self.safety_checker] if isinstance(self.safety_checker, nn.Module) else []
        try:
            places = [torch.device(each) for each in given if isinstance(each, str | torch.device)]
            if any(place.type == "meta" for place in places):
                raise NotImplementedError("'meta' holds no numbers")  # all weights would be lost
            for network in (self.model, *checker):
                network.to(*args, **kwargs)
        except TypeError as error:
            raise EditTypeError(NO_TARGET) from error
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"the pipeline cannot be moved: {first_line(error)}") from error
        return self

    def enable_attention_slicing(
        self, slice_size: str | int | None = "auto", *, queries: int | None = None
    ) -> None:
        """Run the UNet's attention in slices: less memory, the same numbers up to rounding.

        Args:
            slice_size: heads at once, as in diffusers: ``auto`` is half of them, ``max`` one (which saves the
                most), a number so many, None all.
            queries: instead, attention of UNet and autoencoder on so many queries at a time, which bounds
                memory on large images, too.
        """
        set_attention_slicing(self.model)
        if queries is not None:
            check_count("queries", queries)
            set_attention_slicing(self.model, queries)
        elif slice_size is not None:
            set_attention_slicing(self.model.unet, heads_at_once=self._heads(slice_size))

    def _heads(self, slice_size: str | int) -> int:
        heads = self.model.config.unet.num_heads
        if isinstance(slice_size, str):
            named = {"auto": max(heads // 2, 1), "max": 1}
            if slice_size not in named:
                raise EditValueError(f"slice_size is '{slice_size}'; it must be auto, max or a number")
            return named[slice_size]
        check_count("slice_size", slice_size)
        if slice_size > heads:
            raise EditValueError(
                f"slice_size is {slice_size}, but the UNet has {heads} heads; queries=N slices the queries"
            )
        return slice_size

    def disable_attention_slicing(self) -> None:
        """Run attention on everything at once again."""
        set_attention_slicing(self.model)

    def enable_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep parts on the CPU while they are idle, and run each on ``device``."""
        self.disable_cpu_offload()
        self._offload = Offload(self.model, device)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Do what :meth:`enable_cpu_offload` does, on a device or the accelerator of that number."""
        place = str(device or "cuda")
        if gpu_id is not None:
            if isinstance(gpu_id, bool) or not isinstance(gpu_id, int):
                raise EditTypeError(f"gpu_id: {type(gpu_id).__name__}; it must be an int")
            if ":" in place:
                raise EditValueError(f"gpu_id is {gpu_id}, but device '{place}' has a number already")
            place = f"{place}:{gpu_id}"
        self.enable_cpu_offload(place)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Do what :meth:`enable_model_cpu_offload` does: networks are moved whole, not layer by layer."""
        warn_once("sequential CPU offload: networks are moved whole here, as enable_model_cpu_offload does")
        self.enable_model_cpu_offload(gpu_id, device)

    def disable_cpu_offload(self) -> None:
        """Undo the offloading: all parts go to the device that they ran on."""
        if self._offload is not None:
            self._offload.remove()
            self._offload = None

    def enable_vae_tiling(self) -> None:
        """Run the autoencoder in bands of rows on images of every size; by default only on large ones.

        The numbers are the same up to rounding: norms see the whole image, so that there are no seams.
        """
        self.model.tile_above = 0

    def disable_vae_tiling(self) -> None:
        """Run the autoencoder in bands on large images only, the default."""
        self.model.tile_above = AutoencoderKL.tile_above

    def compile_unet(self) -> None:
        """Compile the UNet by ``torch.compile``: minutes at the first step, then faster ones on a GPU.

        Each size of image and batch is compiled once. What is made is kept for later starts, in the folder
        that ``TORCHINDUCTOR_CACHE_DIR`` names, else in ``~/.cache/pbe/compiled``. Calls with
        ``reuse_features`` gain nothing. For a CPU it takes a C++ compiler: ``$CXX``, else ``g++``.
        """
        kept = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", expand_home(COMPILED))
        compile_network(self.model.unet, "compile")  # torch settles on a folder, if none is named yet
        warn_once(f"the UNet is compiled at the first step, which takes minutes; kept in '{kept}'")

    # Other names of diffusers' for the same.
    set_attention_slice = enable_attention_slicing
    remove_all_hooks = disable_cpu_offload
    enable_vae_slicing, disable_vae_slicing = enable_vae_tiling, disable_vae_tiling

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Change nothing: PyTorch's own kernels, which are always used, hold no matrix of weights either."""
        warn_once("xformers is not used: PyTorch's own memory-efficient attention is always used")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Change nothing, as :meth:`enable_xformers_memory_efficient_attention`."""
