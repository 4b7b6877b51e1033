"""Models of the Hub, from a small one on loopback.

Its address is read when huggingface_hub is imported, so that who asks it is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from pbe.checkpoints.folders import FileChoice
from pbe.checkpoints.saving import save_checkpoint
from pbe.editing import PaintByExample
from pbe.editing.loading import Hub, select_files
from pbe.errors import UserError
from tests.editing.small_hub import small_hub
from tests.editing.tiny_model import make_tiny_model

NAME = "someone/tiny"
# Answers a call a line; one process for all of them, since importing takes the most time.
SCRIPT = """
import json, sys
from pbe.editing import PaintByExample
from pbe.editing.loading import Hub
from pbe.errors import UserError
for line in sys.stdin:
    kind, name, settings = json.loads(line)
    try:
        if kind == "find":
            found = str(Hub(**settings).find(name))
        else:
            found = PaintByExample.from_pretrained(name, **settings).solver
        print(json.dumps(found), flush=True)
    except UserError as error:
        print(json.dumps(f"error: {error}"), flush=True)
"""


@dataclass
class Told:
    """What came of calls, and what was asked of the Hub.

    Attributes:
        cache: folder of what was downloaded to load a model.
        loaded: solver of that model.
        fetched: the files that were downloaded for it.
        found: answers to calls that find a model.
        cached: folder of what was downloaded for those.
        gone: answers when the Hub could not be reached any more.
    """

    cache: Path
    loaded: str
    fetched: set[str]
    found: list[str]
    cached: Path
    gone: list[str]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    save_checkpoint(folder, make_tiny_model())
    (folder / "model.ckpt").write_bytes(b"the same weights once more, of which nothing is fetched")
    (folder / "README.md").write_text("a model")
    return folder


@pytest.fixture(scope="module")
def told(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    home = tmp_path_factory.mktemp("home")
    here = {"cache_dir": str(home / "cache")}
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    off = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET")
    variables |= dict.fromkeys(off, "1") | {"HF_HOME": str(home)}

    def ask(kind: str, name: str = NAME, **settings: Any) -> str:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps((kind, name, settings)) + "\n")
        process.stdin.flush()
        return str(json.loads(process.stdout.readline()))

    with small_hub(NAME, repository, revisions=("main", "v1"), token="secret") as hub:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=variables | {"HF_ENDPOINT": hub.address},
            cwd=Path(__file__).parents[2], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        loaded = ask("load", cache_dir=str(home / "loading"), revision="v1", token="secret")
        fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
        found = [
            ask("find", **here, local_files_only=True, token="secret"),
            ask("find", **here),
            ask("find", **here, token="secret", revision="v9"),
            ask("find", **here, token="secret"),
            ask("find", **here, local_files_only=True),
            ask("find", "someone/else", **here, token="secret"),
        ]
    gone = [ask("find", **here), ask("find", "a/b")]
    process.communicate(timeout=60)
    assert process.returncode == 0
    return Told(home / "loading", loaded, fetched, found, home / "cache", gone)


def test_a_repository_is_loaded_as_a_model(told: Told):
    assert told.loaded == "plms"
    assert told.fetched == {
        "config.json",
        "unet.safetensors",
        "autoencoder.safetensors",
        "exemplar_encoder.safetensors",
    }
    # the second time nothing has to be reachable, and in this process nothing is
    assert constants.HF_HUB_OFFLINE
    settings = {"revision": "v1", "cache_dir": told.cache, "token": "secret"}
    assert PaintByExample.from_pretrained(NAME, **settings).solver == "plms"


def test_revisions_caches_tokens_and_what_goes_wrong(told: Told):
    found = told.found
    assert found[0] == f"error: '{NAME}' is neither a path here nor in the cache, and the call stays offline"
    assert (
        found[1]
        == f"error: '{NAME}' is neither a path here nor a model on the Hub (a private one needs a token)"
    )
    assert found[2] == f"error: '{NAME}' on the Hub has no revision 'v9'"
    assert found[3].startswith(str(told.cached))
    assert (Path(found[3]) / "unet.safetensors").is_file()
    assert found[4] == found[3]
    assert found[5].startswith("error: 'someone/else' is neither a path here nor a model on the Hub")
    assert told.gone[0] == found[3]  # the cached copy, and a warning
    assert told.gone[1].startswith("error: 'a/b' is no path here, and the Hub cannot be reached: ")


def test_a_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    assert Hub().find("a/b") == Path("a/b")


DIFFUSERS = [
    "README.md",
    "model.ckpt",
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "image_encoder/config.json",
    "image_encoder/pytorch_model.bin",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.bin",
    "vae/diffusion_pytorch_model.bin",
]


def test_a_diffusers_repository_comes_once():
    assert set(DIFFUSERS) - set(select_files(DIFFUSERS, NAME)) == {
        "README.md",
        "model.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.bin",
    }
    checker = ["safety_checker/config.json", "safety_checker/pytorch_model.bin"]
    assert set(checker) < set(select_files([*DIFFUSERS, *checker], NAME))


def test_shards_come_together():
    shards = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    listed = [*shards, "model.safetensors.index.json", "model.bin", "config.yaml"]
    assert set(select_files(listed, NAME)) == set(listed) - {"model.bin"}


def test_a_checkpoint_comes_with_its_settings():
    assert select_files(["a.png", "config.yaml", "model.ckpt", "sub/other.ckpt"], NAME) == [
        "config.yaml",
        "model.ckpt",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["README.md"], "holds no weights"),
        (["a.ckpt", "b.ckpt"], r"holds several models \(a.ckpt, b.ckpt\)"),
        (["model_index.json", "unet/config.json"], "holds no weights in unet/"),
    ],
)
def test_repositories_that_hold_no_one_model(files: list[str], message: str):
    with pytest.raises(UserError, match=message):
        select_files(files, NAME)


FILES = [
    "model_index.json",
    *(f"{part}/config.json" for part in ("unet", "vae", "image_encoder")),
    *(f"{part}/model{variant}{end}" for part in ("unet", "vae", "image_encoder")
      for variant in ("", ".fp16") for end in (".safetensors", ".bin")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (FileChoice(), "model.safetensors"),
        (FileChoice("fp16"), "model.fp16.safetensors"),
        (FileChoice(safetensors=False), "model.bin"),
    ],
)
def test_one_copy_is_fetched(choice: FileChoice, name: str):
    chosen = [each for each in select_files(FILES, "owner/name", choice) if not each.endswith(".json")]
    assert chosen == [f"{part}/{name}" for part in ("unet", "vae", "image_encoder")]
    with pytest.raises(UserError, match="'owner/name' on the Hub: unet/ has no weights of the variant 'x'"):
        select_files(FILES, "owner/name", FileChoice("x"))


def test_a_pipeline_is_uploaded(monkeypatch: pytest.MonkeyPatch):
    calls: dict[str, dict] = {}

    def upload(api: HfApi, **settings: Any) -> SimpleNamespace:
        folder = Path(settings.pop("folder_path"))
        calls["upload"] = settings | {"files": sorted(path.name for path in folder.iterdir())}
        return SimpleNamespace(commit_url="https://here/commit/1")

    def create(api: HfApi, name: str, **settings: Any) -> SimpleNamespace:
        calls["create"] = settings | {"name": name, "token": api.token}
        return SimpleNamespace(repo_id=f"me/{name}")

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", create)
    pipe = PaintByExample(make_tiny_model())
    assert pipe.push_to_hub("mine", "first", True, "secret") == "https://here/commit/1"
    assert calls["create"] == {"name": "mine", "private": True, "exist_ok": True, "token": "secret"}
    names = ["autoencoder.safetensors", "config.json", "exemplar_encoder.safetensors", "unet.safetensors"]
    told = {"repo_id": "me/mine", "commit_message": "first", "create_pr": False, "files": names}
    assert calls["upload"] == told


def test_an_upload_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match="uploading to 'me/mine' failed: no route to host"):
        PaintByExample(make_tiny_model()).push_to_hub("me/mine")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be the name of a repository"):
        PaintByExample(make_tiny_model()).push_to_hub("a b/c d/e")
