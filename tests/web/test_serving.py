"""The command: start, many clients, SIGTERM, gradio_client, the exported folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.web.conftest import EXAMPLES, Served, need_web

need_web()

import httpx  # noqa: E402
import torch  # noqa: E402

from pbe.checkpoints.native import load_config, open_native  # noqa: E402
from pbe.cli.main import main  # noqa: E402
from pbe.resources import MODELS  # noqa: E402
from pbe.web.records import read_inputs, read_settings  # noqa: E402
from pbe.web.settings import ServeSettings  # noqa: E402

EDITS, CLIENTS, ROUNDS, STEPS = 200, 8, 5, 3


def ask(url: str, number: int, seed: int, **data: Any) -> tuple[int, bytes, str]:
    """Status, content and record of an edit of an example."""
    files = {kind: (EXAMPLES / f"{number}_{kind}.png").read_bytes() for kind in ("image", "mask", "exemplar")}
    values = {"seed": seed, "steps": STEPS, "output": "png"} | data
    with httpx.Client(timeout=600, verify=False) as client:
        answer = client.post(f"{url}edit", data=values, files=files)
    return answer.status_code, answer.content, answer.headers.get("X-Record", "")


def again(editor: Any, number: int, record: dict[str, Any]) -> np.ndarray:
    """The edit of a record, made as its command makes it: in a batch as large, of which it is the first."""
    files = [(EXAMPLES / f"{number}_{kind}.png").read_bytes() for kind in ("image", "mask", "exemplar")]
    inputs = read_inputs(files[0], files[1], files[2:], editor.settings)
    rows, seed = record["batch_size"], record["seed"]
    output = editor.pipe.edit(
        [inputs.exemplars[0]] * rows,
        [inputs.image] * rows,
        [inputs.mask] * rows,
        read_settings({"steps": record["steps"], "solver": record["solver"]}, editor.settings),
        generator=[torch.Generator().manual_seed(seed + index) for index in range(rows)],
    )
    return np.asarray(output.images[0])


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", "toy", "--port", str(taken.getsockname()[1])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Address already in use")
    assert "--port" in line


@dataclass
class Command:
    """A server that was started by its command, and the seconds until it was ready."""

    process: subprocess.Popen[str]
    url: str
    clock: float
    work: float

    def spent(self) -> np.ndarray:
        """Seconds of the clock, and of a processor in the server."""
        used = psutil.Process(self.process.pid).cpu_times()
        return np.array([time.perf_counter(), used.user + used.system])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def server(words: list[str], port: int, log: Path, **more: Any) -> Iterator[Command]:
    """Run a command that serves, from when it is ready on; its log must hold no traceback at the end."""
    start = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, **more)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith(f"serving toy at http://127.0.0.1:{port}"), said + log.read_text()
        found = Command(process, f"http://127.0.0.1:{port}/", 0.0, 0.0)
        clock, found.work = found.spent()
        found.clock = clock - start
        yield found
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    port = free_port()
    words = [sys.executable, "-m", "pbe.cli", "serve", "--device", "cpu", "--port", str(port)]
    with server(words, port, tmp_path_factory.mktemp("server") / "log") as found:
        yield found


def test_an_exported_student_is_whole(tmp_path: Path) -> None:
    from pbe.web import space

    assert space._copy_model("toy-fast", tmp_path) == "model"
    (tmp_path / "model").rename(tmp_path / "moved")
    assert load_config(tmp_path / "moved").unet.few_steps == 4
    assert len(open_native(tmp_path / "moved").tensors) > 600


@pytest.mark.slow
def test_the_command_is_ready_soon(started: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nready in {started.clock:.1f} s, {started.work:.1f} s of a processor")
    assert started.work < 10.0  # of the clock too, on a machine with nothing else to do


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_clients_get_their_own_edits(
    started: Command, editor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def client(number: int, seeds: range) -> list[tuple[Any, ...]]:
        return [(number % 6, *ask(started.url, number % 6, 1000 * number + seed)) for seed in seeds]

    process, used, answers = psutil.Process(started.process.pid), [], []
    costs = np.zeros((2, 2))  # seconds of clock and processor of one edit; alone, and with others
    client(0, range(3))
    with ThreadPoolExecutor(CLIENTS) as pool:
        for first in range(0, EDITS // CLIENTS, EDITS // CLIENTS // ROUNDS):
            seeds = range(first, first + EDITS // CLIENTS // ROUNDS)
            begin = started.spent()
            client(0, seeds)  # in turns with all, so that other work on the machine strikes both
            middle = started.spent()
            for each in pool.map(client, range(CLIENTS), [seeds] * CLIENTS):
                answers.extend(each)
            costs += [(middle - begin) / len(seeds), (started.spent() - middle) * ROUNDS / EDITS]
            used.append(process.memory_info().rss)
    (clock, work), memory = costs[0] / costs[1], [each >> 20 for each in used]
    alone, together = ROUNDS / costs[:, 0]
    with capsys.disabled():
        print(f"\nedits a second: {alone:.2f} alone, {together:.2f} of {CLIENTS} clients")
        print(f"{clock:.2f} times, by processor time {work:.2f} times; memory {memory} MiB")
    assert len(answers) == EDITS
    assert {status for _, status, _, _ in answers} == {200}
    for number, _, content, record in answers:
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert np.array_equal(pixels, again(editor, number, json.loads(record)))
    assert max(used[1:]) <= 1.1 * used[0]
    assert work > 1.4  # 1.6 to 1.8 by both where it was measured; other work on the machine disturbs it


@pytest.mark.slow
def test_sigterm_ends_cleanly_with_every_request_answered(started: Command) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, started.url, number, 0, steps=40 + number) for number in range(4)]
        time.sleep(2.0)
        started.process.send_signal(signal.SIGTERM)
        statuses = {each.result()[0] for each in asked}
    assert started.process.wait(60) == 0
    assert statuses <= {200, 503}
    assert 503 in statuses


@pytest.mark.slow
def test_gradio_client_edits(served: Served) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(served.url, verbose=False)
    paths = [gradio_client.handle_file(EXAMPLES / f"0_{kind}.png") for kind in ("image", "mask", "exemplar")]
    answer = client.predict(paths[0], paths[1], paths[2:], {"steps": 2, "seed": 4}, api_name="/edit")
    assert answer["edits"][0]["record"]["seed"] == 4
    assert answer["edits"][0]["image"].startswith("data:image/png;base64,")
    with pytest.raises(Exception, match="there is no setting 'stepz'"):
        client.predict(paths[0], paths[1], paths[2:], {"stepz": 2}, api_name="/edit")


def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PBE_PASSWORD", raising=False)
    for words, said in (
        (["--port", "70000"], "--port is 70000; it must be at most 65535"),
        (["--model", "/nowhere"], "--model '/nowhere' does not exist"),
        (["--user", "me"], "--user needs a password"),
        (["--max-steps", "0"], "--max-steps is 0; it must be at least 1"),
    ):
        assert main(["serve", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_of_the_server_loses_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert ServeSettings(model=str(tmp_path / "mine")).model_name == "mine"
    assert ServeSettings(model="owner/name").model_name == "owner/name"
    for name in MODELS:
        assert ServeSettings(model=name).model_name == name, "what repeats an edit"
    assert ServeSettings(user="a", password="hidden").__repr__().count("hidden") == 0


def test_the_exported_folder_is_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pbe.web import space

    monkeypatch.setattr(space, "requirements", lambda: ["torch==2.6"])
    target = tmp_path / "space"
    assert main(["serve", "--export", str(target)]) == 0
    header = re.match(r"---\n(.*?)\n---\n", (target / "README.md").read_text(), re.DOTALL)
    assert header
    assert {"sdk: gradio", "app_file: app.py"} <= set(header[1].splitlines())
    assert (target / "pbe/_resources/data/toy/model/unet.safetensors").is_file()
    code = "import pbe, sys; from pbe.resources import find_model; print(pbe.__file__, find_model('toy'))"
    environment = os.environ | {"PYTHONPATH": str(target)}
    ran = subprocess.check_output([sys.executable, "-c", code], cwd=target, env=environment, text=True)
    package, model = ran.split()
    assert Path(package).is_relative_to(target)
    assert Path(model).is_relative_to(target)
    compile((target / "app.py").read_text(), "app.py", "exec")
    assert main(["serve", "--export", str(target)]) == 2


@pytest.mark.slow
def test_the_exported_app_serves_from_its_folder(tmp_path: Path) -> None:
    target, port = tmp_path / "space", free_port()
    assert main(["serve", "--export", str(target)]) == 0
    app = target / "app.py"
    assert '"7860"' in app.read_text()
    app.write_text(app.read_text().replace('"7860"', f'"{port}"'))
    names = {line.partition("==")[0].partition("[")[0] for line in (target / "requirements.txt").open()}
    assert {"torch", "timm", "fastapi-offline"} <= names
    assert "pbe" not in names
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with server([sys.executable, "app.py"], port, tmp_path / "log", cwd=target, env=surroundings) as found:
        assert httpx.get(found.url).status_code == 200
        status, content, record = ask(found.url, 0, 0)
    assert status == 200, content
    assert json.loads(record)["model"] == "toy"
