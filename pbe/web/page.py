"""The page: what stands where, and what happens when something is pressed."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from pbe.editing.settings import PRESETS, EditSettings, PresetName
from pbe.errors import UserError
from pbe.web.app import EXAMPLES, STATIC, Editor
from pbe.web.records import CHOICES, read_inputs, read_record, read_settings, split
from pbe.web.service import Edit
from pbe.web.views import part, results, running

TICK = 0.25  # seconds between two looks at how far an edit is
HEAD = '<script src="pbe/page.js"></script><meta name="color-scheme" content="light dark">'
MOUNT = "(function go() { window.pbe ? window.pbe.mount(element) : setTimeout(go, 30); })();"
COLLECT = "(_, ...others) => [window.pbe.collect(), ...others]"
DICE = 2**31 - 1
BROWSERS_SEED = 2**53 - 1  # beyond it their numbers skip some
OWN = "the model's own"
OWN_SOLVER = {"solver": "", "spacing": "", "karras": False}
BUSY = ({"interactive": False, "__type__": "update"}, {"interactive": True, "__type__": "update"})
WORKING, READY = (BUSY[0], BUSY[0]), BUSY[::-1]  # of the buttons Paint and Cancel


def mount_page(api: FastAPI, editor: Editor) -> FastAPI:
    """Return the application with the page at its root."""
    seconds = max(int(editor.settings.keep_minutes * 60), 60)
    with gr.Blocks(title="Paint by Example", analytics_enabled=False, delete_cache=(60, seconds)) as page:
        _Page(editor).build()
    page.queue(max_size=editor.settings.max_queue, default_concurrency_limit=None)
    return gr.mount_gradio_app(
        api,
        page,
        path="/",
        theme=_theme(),
        css_paths=STATIC / "page.css",
        head=HEAD,
        max_file_size=f"{editor.settings.max_megabytes}mb",
        footer_links=["settings"],
        run_history=False,
        show_error=False,
        ssr_mode=False,
    )


def _theme() -> gr.themes.Base:
    """Return colours that can be read, light and dark, and fonts that are on every machine."""
    theme = gr.themes.Soft(
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"), primary_hue="indigo"
    )
    both = {
        "block_title_background_fill": "none",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
        "checkbox_label_background_fill_selected": "*primary_600",
        "input_border_width": "1px",
    }
    lights = dict.fromkeys(
        ("body_text_color_subdued", "block_info_text_color", "block_label_text_color"), "*neutral_600"
    )
    lights |= {"block_title_text_color": "*neutral_800", "link_text_color": "*primary_700"}
    lights |= {"checkbox_border_color": "*neutral_400", "input_border_color": "*neutral_300"}
    darks = {f"{name}_dark": "*neutral_300" for name in lights} | {"link_text_color_dark": "*primary_300"}
    darks |= {"checkbox_border_color_dark": "*neutral_400", "input_border_color_dark": "*neutral_600"}
    theme.set(block_title_padding="0")
    return theme.set(**both, **{f"{name}_dark": value for name, value in both.items()}, **lights, **darks)


class _Page:
    """The components of the page and their handlers."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.fields: dict[str, Any] = {}
        self.preset: gr.Radio
        self.running: dict[str, list[Edit]] = {}

    def build(self) -> None:
        """Lay out the page."""
        gr.HTML(part("header", self.editor.settings.model_name))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320, elem_id="pbe-boards"):
                with gr.Row(equal_height=False):
                    with gr.Column(min_width=300):
                        gr.HTML(part("board", "image"), js_on_load=MOUNT)
                    with gr.Column(min_width=300):
                        gr.HTML(part("board", "exemplar"), js_on_load=MOUNT)
                gr.HTML(part("examples", EXAMPLES), js_on_load=MOUNT)
            with gr.Column(scale=1, min_width=300):
                gr.HTML(part("title", "result"))
                with gr.Row(elem_id="pbe-buttons"):
                    run = gr.Button("Paint", variant="primary", elem_id="pbe-run", min_width=120)
                    cancel = gr.Button(
                        "Cancel", variant="stop", interactive=False, elem_id="pbe-cancel", min_width=120
                    )
                panel = gr.HTML(part("message", "The edit appears here.", False), js_on_load=MOUNT)
        with gr.Accordion("Settings", open=True, elem_id="pbe-settings"):
            self._settings()
        collected = gr.Textbox(visible=False)
        wider = gr.Button(elem_id="pbe-wider", visible="hidden")
        wider.click(
            lambda margin: max(2 * margin, 1.0),
            self.fields["margin"],
            self.fields["margin"],
            api_visibility="private",
        )
        read = self._reading()
        outputs = [panel, run, cancel, read]
        run.click(
            self.run,
            [collected, *self.fields.values()],
            outputs,
            js=COLLECT,
            show_progress="hidden",
            api_visibility="private",
        )
        cancel.click(self.cancel, collected, None, js="() => [window.pbe.run]", api_visibility="private")
        self._api()

    def _settings(self) -> None:
        limits, usual, low, high = self.editor.settings, EditSettings(), 0.0, 20.0
        unet = self.editor.pipe.model.config.unet
        if unet.guidance_range:
            low, high = unet.guidance_range
        preset = self.preset = gr.Radio(
            [(each.capitalize(), each) for each in PRESETS],
            label="Preset",
            info="Solver, spacing and steps in one word.",
        )
        with gr.Row():
            self.fields["steps"] = gr.Slider(
                1, limits.max_steps, min(self.editor.usual_steps, limits.max_steps), step=1,
                label="Steps", info="More are slower and, up to about 50, better.",
            )  # fmt: skip
            self.fields["guidance_scale"] = gr.Slider(
                low, high, min(max(usual.guidance_scale, low), high), step=0.5, interactive=low < high,
                label="Guidance scale", info="How strongly the exemplar is followed; 1 turns guidance off.",
            )  # fmt: skip
            self.fields["num_images"] = gr.Slider(
                1, limits.max_images, 1, step=1,
                label="Images", info="Edits of each exemplar, each with the next seed.",
            )  # fmt: skip
            with gr.Column(min_width=200):
                self.fields["seed"] = gr.Number(
                    0,
                    precision=0,
                    minimum=0,
                    label="Seed",
                    elem_id="pbe-seed",
                    info="The same seed gives the same edit.",
                )
                dice = gr.Button("Another seed", size="sm", elem_id="pbe-dice")
        dice.click(lambda: random.randrange(DICE), None, self.fields["seed"], api_visibility="private")
        with gr.Row():
            self.fields["region"] = gr.Radio(
                [("Whole image", "full"), ("Surroundings of the mask", "mask")], value="full",
                label="What the model sees", info="For a small mask in a large photograph: surroundings.",
            )  # fmt: skip
            self.fields["margin"] = gr.Slider(
                0, 3, usual.margin, step=0.05, min_width=220,
                label="Margin", info="Of the surroundings: room around the mask, as a share of its side.",
            )  # fmt: skip
            self.fields["preserve_background"] = gr.Checkbox(
                True,
                label="Keep the background",
                info="Outside the mask every pixel stays as it is.",
                min_width=220,
            )
            self.fields["feather"] = gr.Textbox(
                label="Feather", placeholder="by size", max_lines=1,
                info="Of the surroundings: width of the soft seam in pixels.",
            )  # fmt: skip
        with gr.Accordion("Solver and sizes", open=False):
            self._rare()
        named = OWN_SOLVER.keys() | set().union(*PRESETS.values())
        names = [name for name in self.fields if name in named]  # others keep what is being typed
        preset.input(_preset(names), preset, [self.fields[n] for n in names], api_visibility="private")

    def _rare(self) -> None:
        with gr.Row():
            texts = {
                "solver": ("Solver", "How the steps are made; unipc and dpmpp_2m need about 20."),
                "spacing": ("Spacing", "How the steps are spread over the noise levels."),
                "conventions": ("Conventions", "Inputs prepared as the original code or as diffusers does."),
            }
            for name, (label, info) in texts.items():
                choices = [(OWN, ""), *((each, each) for each in CHOICES[name])]
                self.fields[name] = gr.Dropdown(choices, value="", label=label, info=info, min_width=220)
        with gr.Row():
            self.fields["karras"] = gr.Checkbox(
                False, label="Karras noise levels", info="Not with plms, pndm, ddim and lcm.", min_width=220
            )
            self.fields["eta"] = gr.Slider(
                0, 1, 0, step=0.05, min_width=220,
                label="Eta", info="Noise added on the way; with solvers ddim and lcm.",
            )  # fmt: skip
            self.fields["reuse_features"] = gr.Number(
                1, precision=0, minimum=1, min_width=220,
                label="Reuse features", info="So many calls share the inner levels: faster, less exact.",
            )  # fmt: skip
        with gr.Row():
            for name, value, usual, info in (
                ("guidance_interval", _shown(EditSettings.guidance_interval), "0, 1",
                 "Noise levels with guidance, 0 is clean and 1 is noise."),
                ("height", "", "the image's", "Of the result, in pixels."),
                ("width", "", "the image's", "Of the result, in pixels."),
            ):  # fmt: skip
                self.fields[name] = gr.Textbox(
                    value, label=_label(name), placeholder=usual, max_lines=1, info=info, min_width=220
                )
            for each in fields(EditSettings):  # what has no control of its own
                if each.name not in self.fields and each.name != "preset":
                    self.fields[each.name] = gr.Textbox(
                        json.dumps(each.default), label=_label(each.name), max_lines=1, min_width=220,
                        info=f"As --{each.name.replace('_', '-')} of pbe edit.",
                    )  # fmt: skip

    def _reading(self) -> gr.Textbox:
        """Lay out the place where settings are shown and read back."""
        with gr.Accordion("Settings as JSON", open=False):
            text = gr.Textbox(
                lines=8, max_lines=8, label="Settings of the last edit", elem_id="pbe-json",
                info="Paste those of an earlier edit, the page's or pbe edit's, and press Read.",
            )  # fmt: skip
            said = gr.Markdown("", elem_id="pbe-read")
            with gr.Row():
                read = gr.Button("Read", elem_id="pbe-read-button")
                file = gr.UploadButton("Open a settings file", type="binary", file_types=[".json"])
        outputs = [said, text, self.preset, *self.fields.values()]
        read.click(self.read, text, outputs, api_visibility="private")
        file.upload(self.read, file, outputs, api_visibility="private")
        return text

    def read(self, given: str | bytes) -> list[Any]:
        """Set the controls as a JSON says."""
        text = given.decode(errors="replace") if isinstance(given, bytes) else given
        try:
            settings = read_record(text or "", self.editor.settings, self.editor.usual_steps)
            if settings.seed > BROWSERS_SEED:
                raise UserError(f"seed is {settings.seed}; this page takes at most {BROWSERS_SEED}")
        except UserError as error:
            return [f"**Not read:** {error}.", gr.skip(), gr.skip(), *(gr.skip() for _ in self.fields)]
        shown = [_set(control, getattr(settings, name)) for name, control in self.fields.items()]
        return ["Read.", text, None, *shown]

    async def run(self, collected: str, *values: Any) -> AsyncIterator[list[Any]]:
        """Edit, and show how far it is."""
        editor = self.editor
        yield [part("progress", "Reading the images", 0, 0, None), *WORKING, gr.skip()]
        edits: list[Edit] = []
        run = ""
        try:
            run, given = _parse(collected)
            chosen = dict(zip(self.fields, values, strict=True))
            given_settings = {name: _plain(name, chosen[name]) for name in chosen}
            settings = read_settings(given_settings, editor.settings, editor.usual_steps)
            inputs = await run_in_threadpool(self._inputs, given)
            edits = split(inputs, settings, editor.settings, watched=True)
            editor.service.submit(edits)
            self.running[run] = edits
            while not (edits[0].cancelled or all(edit.done.done() for edit in edits)):
                yield [running(edits, editor.service), *BUSY, gr.skip()]
                await asyncio.sleep(TICK)
            if edits[0].cancelled:
                yield [part("message", "Cancelled.", False), *READY, gr.skip()]
                return
            made = [await run_in_threadpool(editor.finish, edit, inputs) for edit in edits]
            names = [editor.store.put(each) for each in made]
            remarks = editor.hint(inputs, settings)
            shown = results(given["image"], names, made, remarks, wider=settings.region == "mask")
            yield [shown, *READY, json.dumps(made[0].record, indent=2)]
        except (UserError, RuntimeError) as error:
            yield [part("message", str(error), True), *READY, gr.skip()]
        finally:
            self.running.pop(run, None)
            editor.service.cancel(edits)

    def cancel(self, run: str) -> None:
        """Stop a run of this page, which knows its name."""
        self.editor.service.cancel(self.running.get(run, []))

    def _inputs(self, given: dict[str, Any]) -> Any:
        """Return the inputs that the browser's boards hold."""
        store, limits = self.editor.store, self.editor.settings
        mask = given["mask"]
        drawn = store.get(mask[5:]).content if mask.startswith("file:") else _png_of(mask)
        exemplars = [store.get(each["name"]).content for each in given["exemplars"]]
        crops = [each["crop"] for each in given["exemplars"]]
        return read_inputs(store.get(given["image"]).content, drawn, exemplars, limits, crops)

    def _api(self) -> None:
        """Give gradio_client its endpoint; nothing of it is seen on the page."""
        with gr.Row(visible=False):
            image, mask = gr.File(label="image", type="binary"), gr.File(label="mask", type="binary")
            exemplars = gr.File(label="exemplars", type="binary", file_count="multiple")
            settings, answer = gr.JSON(label="settings"), gr.JSON(label="edits")
            gr.Button().click(
                self.call, [image, mask, exemplars, settings], answer, api_name="edit", show_progress="hidden"
            )

    async def call(
        self, image: bytes, mask: bytes, exemplars: list[bytes], settings: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Paint exemplars into the masked region of an image.

        Settings are those of pbe edit by their names; each edit comes as a PNG in a data URL with its record.
        """
        try:
            chosen = read_settings(settings or {}, self.editor.settings, self.editor.usual_steps)
            if not image or not mask:
                raise UserError("image and mask are needed")
            inputs = await run_in_threadpool(read_inputs, image, mask, exemplars or [], self.editor.settings)
            return (await self.editor.answer(inputs, chosen)).model_dump()
        except (UserError, RuntimeError) as error:
            raise gr.Error(str(error), print_exception=False) from error


def _shown(value: Any) -> Any:
    """Return what a control shows of a setting."""
    if value is None:
        return ""
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else value


def _set(control: Any, value: Any) -> Any:
    """Return what sets a control; a slider that ends below the value grows."""
    if isinstance(control, gr.Slider) and value > control.maximum:
        return gr.update(value=value, maximum=value)
    return _shown(value)


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _preset(names: list[str]) -> Callable[[PresetName], list[Any]]:
    """Return the handler that sets these controls to what a preset stands for."""

    def choose(preset: PresetName) -> list[Any]:
        chosen = OWN_SOLVER | PRESETS[preset]
        return [chosen.get(name, gr.skip()) for name in names]

    return choose


def _plain(name: str, value: Any) -> Any:
    """Return a control's value; numbers that stand in a text become numbers."""
    if name in CHOICES or not isinstance(value, str) or not value.strip():
        return value
    several = isinstance(getattr(EditSettings, name, None), tuple)
    try:
        return json.loads(f"[{value.strip(' []()')}]" if several else value)
    except ValueError as error:
        wanted = "numbers with commas between them" if several else "a number, or empty"
        raise UserError(f"{name} is '{value}'; it must be {wanted}") from error


def _parse(collected: str) -> tuple[str, dict[str, Any]]:
    """Return the run's name and what the boards hold; an error says what is missing."""
    try:
        given = json.loads(collected)
        exemplars = [{"name": str(each["name"]), "crop": _crop(each["crop"])} for each in given["exemplars"]]
        run = str(given["run"])
        found = {"image": str(given["image"] or ""), "mask": str(given["mask"] or ""), "exemplars": exemplars}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError("the page is out of date; reload it") from error
    if not found["image"]:
        raise UserError("The image is missing: open, drop or paste one.")
    if not found["mask"]:
        raise UserError("The mask is missing: brush over what is to be replaced, or draw a box around it.")
    if not exemplars:
        raise UserError("The exemplar is missing: open an image of what is to be painted in.")
    return run, found


def _crop(box: Any) -> tuple[float, float, float, float] | None:
    if box is None:
        return None
    left, top, right, bottom = (float(each) for each in box)
    return left, top, right, bottom


def _png_of(url: str) -> bytes:
    """Return the file that a data URL holds."""
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError as error:
        raise UserError("the mask did not arrive whole; reload the page") from error
