"""The server: uploads, results and ``POST /edit`` as FastAPI routes, with the page mounted beside them."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from PIL import Image
from pydantic import BaseModel, Field, create_model
from starlette.concurrency import run_in_threadpool

from pbe import __version__
from pbe.editing.images import mask_from_image, pixels_of, require_masked
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import DEFAULT_STEPS, EditSettings
from pbe.errors import UserError
from pbe.resources import packaged
from pbe.web.records import (
    Inputs,
    archive,
    data_url,
    mask_hint,
    open_image,
    read_inputs,
    read_settings,
    record,
    split,
    to_png,
)
from pbe.web.service import BusyError, Edit, EditService
from pbe.web.settings import ServeSettings
from pbe.web.store import Store

STATIC = Path(__file__).parent / "static"
PREVIEW_SIDE = 1536  # of what the browser paints on, in pixels
EXAMPLES = 6
Kind = Literal["image", "mask", "exemplar"]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Uploaded(BaseModel):
    """An upload, by whose name it is spoken of from now on."""

    name: str
    width: int
    height: int


class Edited(BaseModel):
    """One edit."""

    image: str = Field(description="the PNG as a data URL")
    record: dict[str, Any] = Field(description="everything to repeat it, as in the JSON of pbe edit")


class Edits(BaseModel):
    """All edits of a request, and what was noticed about it."""

    edits: list[Edited]
    remarks: list[str]


class Files(BaseModel, extra="forbid"):
    """The files of a request, and the form of its answer."""

    image: UploadFile = Field(description="image to edit")
    mask: UploadFile = Field(description="mask, white = repaint")
    exemplar: list[UploadFile] = Field(description="image of what is painted in; of several each is painted")
    output: Literal["json", "png"] = Field("json", description="png answers with the first edit alone")


SETTINGS: dict[str, Any] = {each.name: (each.type, each.default) for each in fields(EditSettings)}
EditForm: Any = create_model("EditForm", __base__=Files, **SETTINGS)


@dataclass
class Upload:
    """A file as it came, and what of it the browser shows."""

    content: bytes
    preview: bytes

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return len(self.content) + len(self.preview)


@dataclass
class Result:
    """A finished edit with what it was made from."""

    edit: Edit
    content: bytes
    carried: dict[str, Any]
    record: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Size in memory; edits of one request share their image."""
        return len(self.content) + self.edit.image.nbytes + self.edit.mask.nbytes + self.edit.exemplar.nbytes

    @property
    def preview(self) -> bytes:
        """What the browser shows."""
        return self.content


class Editor:
    """A served model: its service, what it remembers, and the way from a request to finished edits."""

    def __init__(self, pipe: PaintByExample, settings: ServeSettings) -> None:
        self.pipe = pipe
        self.settings = settings
        self.service = EditService(pipe, settings.batch_size, settings.max_queue)
        self.store = Store(settings.keep_minutes * 60.0)
        self.usual_steps = pipe.model.config.unet.few_steps or DEFAULT_STEPS

    def upload(self, content: bytes, kind: Kind) -> Uploaded:
        """Check and keep an upload."""
        image = open_image(content, kind, self.settings)
        if kind == "mask":
            mask, _ = mask_from_image(image)
            require_masked(mask, "the mask")
            shown = Image.fromarray(mask.astype(np.uint8) * 255)
        else:
            shown = Image.fromarray(pixels_of(image, kind))
        size, resample = shown.size, Image.Resampling.NEAREST if kind == "mask" else Image.Resampling.LANCZOS
        shown.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), resample)
        name = self.store.put(Upload(content, to_png(shown)))
        return Uploaded(name=name, width=size[0], height=size[1])

    def finish(self, edit: Edit, inputs: Inputs) -> Result:
        """Return the result of an edit that is done."""
        made = edit.done.result()
        carried: dict[str, Any] = {
            key: inputs.carried[key] for key in ("icc_profile", "dpi") if key in inputs.carried
        }
        told = record(edit, made, self.pipe, self.settings)
        kept = replace(edit, done=Future(), preview=None)  # which hold images that nobody counts
        return Result(kept, to_png(made.image, **carried), carried, told)

    async def edit(self, inputs: Inputs, settings: EditSettings) -> list[Result]:
        """Make all edits of a request; whoever stops waiting cancels them."""
        edits = split(inputs, settings, self.settings)
        self.service.submit(edits)
        try:
            await asyncio.gather(*(asyncio.wrap_future(edit.done) for edit in edits))
        finally:
            self.service.cancel(edits)
        return [await run_in_threadpool(self.finish, edit, inputs) for edit in edits]

    async def answer(self, inputs: Inputs, settings: EditSettings) -> Edits:
        """Make all edits of a request, and return what scripts are given."""
        results = await self.edit(inputs, settings)
        edits = [Edited(image=data_url(each.content), record=each.record) for each in results]
        return Edits(edits=edits, remarks=self.hint(inputs, settings))

    def hint(self, inputs: Inputs, settings: EditSettings) -> list[str]:
        """Return what is to be said about the inputs."""
        hint = mask_hint(inputs, settings, self.pipe.model.config.image_size)
        return [*inputs.remarks, *([hint] if hint else [])]


def make_api(editor: Editor) -> FastAPI:
    """Return the application without its page."""
    api = FastAPIOffline(  # its API page takes nothing from the internet
        title="Paint by Example",
        version=__version__,
        description="Paint an exemplar into the masked region of an image.",
        redoc_url=None,
    )
    api.mount("/pbe", StaticFiles(directory=STATIC), name="pbe")
    _add_errors(api)
    _add_files(api, editor)
    _add_edit(api, editor)
    return api


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(UserError)
    def refuse(_: Request, error: UserError) -> JSONResponse:
        busy = isinstance(error, BusyError)
        headers = {"Retry-After": "5"} if busy else None
        return JSONResponse({"detail": str(error)}, 503 if busy else 400, headers)


def _add_files(api: FastAPI, editor: Editor) -> None:
    @api.post("/files", include_in_schema=False)
    def upload(file: UploadFile, kind: Annotated[Kind, Form()]) -> Uploaded:
        return editor.upload(file.file.read(), kind)

    @api.get("/files/{name}.png", include_in_schema=False)
    def show(name: str) -> Response:
        return _private(editor.store.get(name).preview, "image/png")

    @api.get("/files/{name}.zip", include_in_schema=False)
    def download(name: str) -> Response:
        item = editor.store.get(name)
        if not isinstance(item, Result):
            raise UserError("there is an archive of results only")
        content = archive(item.edit, item.content, item.carried, item.record)
        return _private(content, "application/zip", "edit.zip")

    @api.post("/files/{name}", include_in_schema=False)
    def take(name: str) -> Uploaded:
        """Make an image to edit of a result."""
        return editor.upload(editor.store.get(name).content, "image")

    @api.get("/examples/{number}/{kind}.png", include_in_schema=False)
    def example(number: int, kind: Kind) -> Response:
        if not 0 <= number < EXAMPLES:
            raise UserError("there is no such example")
        return Response(example_file(number, kind).read_bytes(), media_type="image/png")


def example_file(number: int, kind: str) -> Path:
    """Return the file of an example that ships."""
    return packaged(f"data/examples/{number}_{kind}.png")


def _private(content: bytes, kind: str, name: str | None = None) -> Response:
    headers = {"Cache-Control": "private, max-age=600"}
    if name:
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return Response(content, media_type=kind, headers=headers)


def _add_edit(api: FastAPI, editor: Editor) -> None:
    limits = editor.settings
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text}
        for status, text in {
            400: "an image or a setting cannot be used",
            413: "the request is too large",
            503: "the queue is full, or the server is stopping",
        }.items()
    }
    refusals[200] = {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}

    @api.post("/edit", response_model=Edits, responses=refusals)
    async def edit(form: Annotated[EditForm, Form(media_type="multipart/form-data")]) -> Any:
        """Paint an exemplar into the masked region of an image."""
        chosen = read_settings({name: getattr(form, name) for name in SETTINGS}, limits, editor.usual_steps)
        files = [await each.read() for each in (form.image, form.mask, *form.exemplar)]
        inputs = await run_in_threadpool(read_inputs, files[0], files[1], files[2:], limits)
        if form.output == "json":
            return await editor.answer(inputs, chosen)
        first = (await editor.edit(inputs, chosen))[0]
        headers = {"X-Record": json.dumps(first.record)}
        return Response(first.content, media_type="image/png", headers=headers)
