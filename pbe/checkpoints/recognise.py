"""What a state dict looks like, told by its keys and shapes alone."""

from __future__ import annotations

from pbe.checkpoints.averages import Sorted
from pbe.checkpoints.tensors import Lazies

NATIVE = "native"
COMPVIS = "compvis"

INPUTS = {
    "compvis": "model.diffusion_model.input_blocks.0.0.weight",
    "diffusers": "conv_in.weight",
    "native": "unet.conv_in.weight",
}

# A prefix that gives a kind of file away, and what to say of it; the first that fits is taken.
SIGNS = (
    ("conditioner.embedders.", "a Stable Diffusion XL checkpoint, which has no exemplar encoder"),
    ("cond_stage_model.model.transformer.", "a Stable Diffusion 2 checkpoint, which has no exemplar encoder"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 checkpoint, which has no exemplar encoder"),
    ("control_model.", "a ControlNet, not a whole model"),
    ("lora_", "a LoRA, not a whole model"),
    ("text_model.", "a text encoder alone, not a whole model"),
    ("encoder.down_blocks.", "the autoencoder alone of a folder in diffusers' layout; give the whole folder"),
    ("encoder.down.", "an autoencoder alone in the original's layout, not a whole model"),
    ("encoder.levels.", "the autoencoder alone of a native folder; give the whole folder"),
    ("mapper.blocks.", "the image encoder alone of a folder in diffusers' layout; give the whole folder"),
    ("tower.", "the exemplar encoder alone of a native folder; give the whole folder"),
    ("vision_model.", "an image tower alone, not a whole model"),
    ("visual.", "a CLIP model, not a whole model"),
    ("down_blocks.", "the UNet alone of a folder in diffusers' layout; give the whole folder"),
    ("input_blocks.", "a UNet alone in the original's layout, not a whole model"),
    ("down.", "the UNet alone of a native folder; give the whole folder"),
)
# Of the networks' names; two of them make most of a model.
WHOLE = {
    COMPVIS: ("first_stage_model.", "cond_stage_model."),
    NATIVE: ("unet.", "autoencoder.", "exemplar_encoder."),
}
TEXT = "cond_stage_model.transformer.text_model."


def layout_of(found: Sorted) -> str | None:
    """Return ``compvis`` or ``native`` for the state dict of a whole model, or of most of it; else None."""
    names = [*found.plain, *found.average]
    if any(key.startswith(("model.diffusion_model.", "diffusion_model")) for key in names):
        return COMPVIS
    for layout, prefixes in WHOLE.items():
        if sum(any(key.startswith(prefix) for key in names) for prefix in prefixes) > 1:
            return layout
    return None


def describe(tensors: Lazies) -> str:
    """Return a sentence on what the file looks like and, where that helps, what to do."""
    if any(key.startswith(TEXT) for key in tensors):
        return text_to_image(_inputs(tensors))
    if any(".lora" in key for key in tensors):
        return "It looks like a LoRA, not a whole model."
    for prefix, what in SIGNS:
        if any(key.startswith(prefix) for key in tensors):
            return f"It looks like {what}."
    layout = layout_of(Sorted(tensors, {}, {}))
    if layout == COMPVIS:
        if not any(key.startswith("cond_stage_model.") for key in tensors):
            return f"It looks like the original's layout without an exemplar encoder ({_channels(tensors)})."
        return (
            f"It looks like the original's layout ({_channels(tensors)}); is the configuration the right one?"
        )
    if layout == NATIVE:
        return f"It looks like the native layout ({_channels(tensors)}); is the configuration the right one?"
    return "It looks like none of the layouts known here (native, the original's, diffusers')."


def text_to_image(inputs: int | None) -> str:
    """Return what to say of a Stable Diffusion model with a text encoder and so many input channels."""
    if inputs == 9:
        return (
            "It looks like a Stable Diffusion inpainting model, which has a text encoder; its 9 input "
            "channels are in another order (latents, mask, masked image; here latents, masked image, mask), "
            "so it cannot be used."
        )
    return (
        "It looks like a Stable Diffusion text-to-image model, which has a text encoder and no exemplar "
        "encoder; pbe convert --from-sd makes the start of a training from it."
    )


def _inputs(tensors: Lazies) -> int | None:
    return next((tensors[key].shape[1] for key in INPUTS.values() if key in tensors), None)


def _channels(tensors: Lazies) -> str:
    first = next((tensors[key].shape for key in INPUTS.values() if key in tensors), None)
    return "no input convolution" if first is None else f"{first[0]} channels wide, {first[1]} input channels"
