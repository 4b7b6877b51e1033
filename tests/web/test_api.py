"""``POST /edit`` and the guard before it."""

from __future__ import annotations

import base64
import io
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from PIL import Image

from tests.web.conftest import EXAMPLES, need_web

need_web()

from starlette.testclient import TestClient  # noqa: E402

from pbe.editing.settings import PRESETS, EditSettings  # noqa: E402
from pbe.web.serving import Guard, make_app  # noqa: E402
from pbe.web.settings import ServeSettings  # noqa: E402


@pytest.fixture(scope="module")
def client(app: Any) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


def files(**others: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    kinds = {kind: (EXAMPLES / f"0_{kind}.png").read_bytes() for kind in ("image", "mask", "exemplar")}
    return [(kind, (f"{kind}.png", content)) for kind, content in (kinds | others).items()]


def post(client: TestClient, data: dict[str, Any] | None = None, **others: bytes) -> Any:
    return client.post("/edit", data={"steps": 2} | (data or {}), files=files(**others))


def picture(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, "PNG")
    return buffer.getvalue()


def test_an_edit_comes_as_json_or_as_a_png(client: TestClient) -> None:
    answer = post(client, {"seed": 3, "num_images": 2})
    assert answer.status_code == 200
    edits = answer.json()["edits"]
    assert [each["record"]["seed"] for each in edits] == [3, 4]
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(each["image"].split(",")[1])))) for each in edits
    ]
    assert not np.array_equal(*pixels)
    plain = post(client, {"seed": 3, "num_images": 2, "output": "png"})
    assert plain.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(plain.content))), pixels[0])


def test_every_setting_of_an_edit_is_in_the_form(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    form = set(schemas["EditForm"]["properties"])
    assert form == {"image", "mask", "exemplar", "output", *(each.name for each in fields(EditSettings))}
    chosen = {"preset": "draft", "steps": 3, "guidance_interval": [0.25, 0.75], "reuse_features": 2}
    told = post(client, chosen).json()["edits"][0]["record"]
    assert (told["solver"], told["steps"], told["spacing"]) == (PRESETS["draft"]["solver"], 3, "trailing")
    assert told["guidance_interval"] == [0.25, 0.75]
    assert "--guidance-interval 0.25 0.75 --reuse-features 2" in told["repeat"]


@pytest.mark.parametrize(
    ("data", "others", "said"),
    [
        ({"guidance_interval": [0.8, 0.2]}, {}, "the lower number comes first"),
        ({"guidance_interval": [0, 2]}, {}, "guidance_interval is 2.0"),
        ({"reuse_features": 0}, {}, "reuse_features is 0; it must be at least 1"),
        ({"steps": 61}, {}, "steps is 61; this server takes at most 60"),
        ({"num_images": 9}, {}, "num_images is 9; this server takes at most 8"),
        ({"guidance_scale": -1}, {}, "guidance_scale is -1.0"),
        ({"height": 60_000, "width": 60_000}, {}, "million pixels"),
        ({"seed": -1}, {}, "seed is -1"),
        ({}, {"image": b"GIF89a"}, "image: "),
        ({}, {"mask": picture((64, 64)).replace(b"IDAT", b"IDAX")}, "mask: "),
        ({}, {"exemplar": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "this is not an image"),
        ({}, {"image": b"0" * (2**21 + 1)}, "more than 2 MB"),
        ({}, {"image": picture((3000, 2000))}, "3000x2000 is too large"),
    ],
)
def test_what_cannot_be_used_is_said(
    client: TestClient, data: dict[str, Any], others: dict[str, bytes], said: str
) -> None:
    answer = post(client, data, **others)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["detail"]
    assert "/work" not in answer.text
    assert "/tmp" not in answer.text


def test_more_exemplars_than_edits_are_refused_before_one_is_decoded(client: TestClient) -> None:
    many = [("exemplar", (f"{number}.png", b"no image")) for number in range(9)]
    answer = client.post("/edit", data={"steps": 2}, files=[*files(exemplar=b"no image"), *many])
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("10 exemplars with 1 images each are 10 edits")


def test_an_unknown_field_is_refused(client: TestClient) -> None:
    assert post(client, {"stepz": 3}).status_code == 422


def test_uploads_are_found_by_their_names_only_and_forgotten(client: TestClient, editor: Any) -> None:
    answer = client.post("/files", data={"kind": "image"}, files={"file": ("../../x", picture((8, 6)))})
    uploaded = answer.json()
    assert (uploaded["width"], uploaded["height"]) == (8, 6)
    assert client.get(f"/files/{uploaded['name']}.png").status_code == 200
    assert client.get("/files/..%2f..%2fetc%2fpasswd.png").status_code in (400, 404)
    editor.store.seconds, usual = -1.0, editor.store.seconds
    editor.store.sweep()
    editor.store.seconds = usual
    assert client.get(f"/files/{uploaded['name']}.png").status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Basic " + base64.b64encode(b"a:wrong").decode()}, 401),
        ({"Authorization": "Basic " + base64.b64encode(b"a:secret").decode()}, 200),
    ],
)
def test_a_password_guards_page_and_api(app: Any, headers: dict[str, str], status: int) -> None:
    guarded = Guard(app.app, ServeSettings(user="a", password="secret"))
    client = TestClient(guarded)
    assert client.get("/openapi.json", headers=headers).status_code == status
    assert client.get("/", headers=headers).status_code == status


def test_other_sites_and_endless_bodies_are_refused(app: Any) -> None:
    client = TestClient(Guard(app.app, ServeSettings(max_megabytes=1)))
    assert client.get("/openapi.json", headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert client.get("/openapi.json", headers={"Origin": "http://testserver"}).status_code == 200
    endless = (b"x" * 2**20 for _ in range(20))
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/files", content=endless, headers=form).status_code == 413
    assert client.post("/files", headers={"Content-Length": str(2**40)}).status_code == 413


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.sampled_from(["image", "mask", "exemplar"]), st.integers(0, 400))
def test_damaged_images_are_refused_or_edited(
    client: TestClient, noise: bytes, kind: str, place: int
) -> None:
    whole = (EXAMPLES / f"0_{kind}.png").read_bytes()
    answer = post(client, {"steps": 1}, **{kind: whole[:place] + noise + whole[place + len(noise) :]})
    assert answer.status_code in (200, 400)
    assert "Traceback" not in answer.text


@pytest.mark.slow
def test_no_request_of_the_api_page_is_a_defect(app: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_asgi("/openapi.json", app)

    @hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=schema["/edit"]["POST"].as_strategy())
    def every(case: Any) -> None:
        case.call_and_validate(
            checks=(not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance)
        )

    every()


def test_the_server_does_not_tell_where_anything_lies(client: TestClient) -> None:
    secret = (str(EXAMPLES.parents[1]), os.environ["GRADIO_TEMP_DIR"], sys.prefix, str(Path.home()) + "/")
    for page in ("", "config", "openapi.json", "docs", "gradio_api/info", "gradio_api/app_id"):
        answer = client.get(f"/{page}")
        assert answer.status_code == 200, page
        assert not [each for each in secret if each in answer.text], page
    for file in ("/etc/passwd", str(EXAMPLES / "0_image.png"), "pyproject.toml", "../pyproject.toml"):
        assert client.get(f"/gradio_api/file={file}").status_code in (403, 404), file


def test_the_api_page_needs_no_internet(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "swagger-ui" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_stopping_server_answers(editor: Any) -> None:
    from pbe.web.app import Editor

    stopping = Editor(editor.pipe, editor.settings)
    stopping.service.close(1.0)
    answer = post(TestClient(make_app(stopping), raise_server_exceptions=False))
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
