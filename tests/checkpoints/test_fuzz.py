"""Whatever a file of a model holds, loading it succeeds or ends in one line; seeded, so faults come again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.saving import save_checkpoint
from pbe.checkpoints.tower_weights import load_tower_weights
from pbe.config import Config, ExemplarEncoderConfig, to_dict
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.image_tower import build_tower
from tests.checkpoints.small import original_state, small_config

WRONG: list[Any] = [
    None, True, "", "x", -1, 0, 1, 3, 2.5, 1e308, float("nan"), float("inf"), 10**9, 10**30, [], [0], [-1, 2],
    [[1]], ["x"], [None], {}, {"x": 1}, [2] * 100, "../../etc/passwd", "vit/8x99999-patch1-heads1-mlp1",
]  # fmt: skip
TYPES = (
    torch.int8,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.float8_e5m2,
)
LAYOUTS = ("native", "compvis", "diffusers", "training", "single", "legacy")
TOWER = "vit/32x2-patch16-heads2-mlp64"


def must_not_break(load: Callable[[], Any], what: str) -> bool:
    """Return whether it loaded; anything else than one line of the user's errors fails the test."""
    try:
        load()
    except UserError as error:
        if "\n" in str(error) or not str(error):
            pytest.fail(f"{what}: not one line: {error}")
        return False
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    return True


@pytest.fixture(scope="module")
def sources(small: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in every form that is read."""
    folder = tmp_path_factory.mktemp("sources")
    for layout in ("native", "compvis", "diffusers"):
        save_checkpoint(folder / layout, small, layout)
    for name in ("training", "single", "legacy"):
        (folder / name).mkdir()
    config = to_dict(Config()) | {"model": to_dict(small_config())}
    state = {f"model.{key}": value for key, value in small.state_dict().items()}
    content = {"state_dict": state, "ema": state, "config": config, "global_step": 3}
    torch.save(content, folder / "training" / "last.ckpt")
    save_file(original_state(small), folder / "single" / "a.safetensors")
    torch.save(original_state(small), folder / "legacy" / "a.ckpt", _use_new_zipfile_serialization=False)
    for name in ("single", "legacy"):
        shutil.copy(folder / "compvis" / "config.yaml", folder / name / "a.yaml")
    return folder


def bytes_damaged(path: Path, draw: random.Random) -> str:
    """Flip, cut, blank, double or insert bytes; most faults lie in the headers at either end."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "blank", "double", "insert", "empty", "text"])
    start = draw.choice([0, max(0, len(content) - 4000), draw.randrange(len(content) or 1)])
    place = min(len(content), start + draw.randrange(4000))
    if kind == "flip":
        for _ in range(draw.choice([1, 3, 50])):
            content[draw.randrange(start, min(len(content), start + 4000))] = draw.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "blank":
        content[place : place + 200] = bytes(min(200, len(content) - place))
    elif kind == "double":
        content[place:place] = content[place : place + 100]
    elif kind == "insert":
        content[place:place] = draw.randbytes(draw.choice([1, 8, 300]))
    else:
        content = bytearray(b"" if kind == "empty" else b"\xff\xfe not a model \x00")
    path.write_bytes(content)
    return f"{kind} at {place}"


def field_changed(path: Path, draw: random.Random) -> str:
    """Put a wrong value into a field of a JSON file, take the field away or the whole content."""
    content = json.loads(path.read_text())
    places = list(_places(content))
    holder, key = draw.choice(places)
    value = draw.choice(WRONG)
    if draw.random() < 0.1:
        content = value
    elif draw.random() < 0.1:
        del holder[key]
    else:
        holder[key] = value
    path.write_text(json.dumps(content))
    return f"{key} = {value!r}"


def _places(content: Any) -> Any:
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from _places(content[key])


def tensors_changed(path: Path, draw: random.Random) -> str:
    """Give tensors of a safetensors file or of a checkpoint another type, shape, value or name."""
    if path.suffix == ".safetensors":
        state = whole = load_file(path)
    else:
        whole = torch.load(path, weights_only=True)
        state = whole.get(draw.choice(["state_dict", "ema"])) or whole.get("state_dict", whole)
    key = draw.choice(list(state))
    kind = draw.choice(["type", "shape", "value", "name", "number"])
    if kind == "type":
        state[key] = state[key].to(draw.choice(TYPES))
    elif kind == "shape":
        state[key] = draw.choice([state[key].flatten(), torch.zeros(()), torch.zeros(0), state[key][None]])
    elif kind == "value":
        state[key] = state[key] * draw.choice([float("nan"), float("inf"), 1e30])
    elif kind == "name":
        state[draw.choice(["", "x", "module." + key, key + ".y", "unet." + key])] = state.pop(key).clone()
    elif path.suffix != ".safetensors":
        state[key] = draw.choice(WRONG)
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(whole, path)
    return f"{kind} of {key}"


def carried_changed(path: Path, draw: random.Random) -> str:
    """Put a wrong value into the configuration that a training checkpoint carries."""
    whole = torch.load(path, weights_only=True)
    top = {"config": whole["config"]}
    holder, key = draw.choice(list(_places(top)))
    holder[key] = value = draw.choice([*WRONG, torch.zeros(2)])
    torch.save(whole | top, path)
    return f"{key} = {value!r}"


def replaced(path: Path, draw: random.Random) -> str:
    """Put a folder, a link to nothing or to itself in a file's place."""
    path.unlink()
    kind = draw.choice(["folder", "nothing", "itself", "missing"])
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to(path if kind == "itself" else path.parent / "nowhere")
    return kind


def one_fault(folder: Path, draw: random.Random) -> str:
    """Damage one file of a model; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(files)
    ways: list[Callable[[Path, random.Random], str]] = [bytes_damaged, replaced]
    if path.suffix == ".json":
        ways = [field_changed] * 6 + ways
    if path.suffix == ".safetensors" or (path.suffix == ".ckpt" and folder.name != "legacy"):
        ways += [tensors_changed] * 2
    if folder.name == "training":
        ways += [carried_changed] * 4
    way = draw.choice(ways)
    return f"{path.relative_to(folder)}: {way.__name__}: {way(path, draw)}"


def fuzz(sources: Path, tmp_path: Path, layout: str, seeds: range) -> None:
    loaded = 0
    for seed in seeds:
        draw, folder = random.Random(f"{layout} {seed}"), tmp_path / layout
        shutil.copytree(sources / layout, folder)
        what = f"{layout} {seed}: {one_fault(folder, draw)}"
        raw = layout == "training" and draw.random() < 0.3
        loaded += must_not_break(lambda: load_checkpoint(folder, raw_weights=raw), what)  # noqa: B023
        shutil.rmtree(folder)
    assert loaded < len(seeds)  # some faults are faults


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_models(sources: Path, tmp_path: Path, layout: str) -> None:
    fuzz(sources, tmp_path, layout, range(8))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_damaged_models(sources: Path, tmp_path: Path, layout: str) -> None:
    fuzz(sources, tmp_path, layout, range(8, 400))


def fuzz_towers(tmp_path: Path, seeds: range) -> None:
    config = ExemplarEncoderConfig(tower=TOWER, image_size=32)
    tower, _ = build_tower(config)
    for seed in seeds:
        draw = random.Random(f"tower {seed}")
        path = tmp_path / draw.choice(["tower.safetensors", "tower.pth"])
        if path.suffix == ".safetensors":
            save_file(tower.state_dict(), path)
        else:
            torch.save(tower.state_dict(), path, _use_new_zipfile_serialization=draw.random() < 0.5)
        what = f"tower {seed}: {draw.choice([bytes_damaged, tensors_changed])(path, draw)}"
        config.pretrained = str(path)
        must_not_break(lambda: load_tower_weights(build_tower(config)[0], config), what)


def test_damaged_tower_files(tmp_path: Path) -> None:
    fuzz_towers(tmp_path, range(20))


@pytest.mark.slow
def test_many_damaged_tower_files(tmp_path: Path) -> None:
    fuzz_towers(tmp_path, range(20, 600))
