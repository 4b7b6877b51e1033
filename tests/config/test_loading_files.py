"""Files and overrides as people write them: what is read, and the one line where it cannot be."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pbe.config import PATHS, Config, load_config, save_yaml, to_dict
from pbe.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def written(folder: Path, content: str | bytes, name: str = "some.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "UTF-16": ("seed: 1\n".encode("utf-16"), "it is not UTF-8 text"),
    "Latin-1": ("output_dir: caf\xe9\n".encode("latin-1"), "it is not UTF-8 text"),
    "zeros": (b"\0" * 100, "not valid YAML"),
    "a tab": ("trainer:\n\tmax_steps: 1\n", "not valid YAML"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
    "a key twice": ("seed: 1\nseed: 2\n", "not valid YAML"),
    "a key twice inside": ("trainer: {max_steps: 1, max_steps: 2}\n", "not valid YAML"),
    "Python": ("seed: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "itself": ("trainer: &t\n  max_steps: *t\n", "a part refers to itself (line 1)"),
    "billion laughs": (LAUGHS, "its references stand for more than 100,000 values"),
    "depth": ("seed: " + "[" * 5000 + "\n", "not valid YAML"),
    "a list": ("- seed\n", "a mapping of keys to values"),
    "a word": ("seed\n", "seed"),
    "a number as key": ("1: 2\n", "unknown key '1'"),
    "nothing as key": ("? \n: 2\n", "some.yaml"),
    "a date": ("seed: 2026-11-27\n", "seed"),
    "a dash too much": ("trainer:\n  - max_steps: 3\n", "'trainer': it is a section of keys"),
    "a list for a value": ("trainer:\n  max_steps: [3]\n", "'trainer.max_steps': it is a single value"),
    "a section for a value": ("seed: {a: 1}\n", "'seed': it is a single value"),
    "a value for a list": ("logging: {loggers: csv}\n", "'logging.loggers': it is a list"),
    "a section for a list": ("model: {unet: {channel_mult: {a: 1}}}\n", "channel_mult': it is a list"),
    "an unknown key deep down": (
        "data: {sample: {augment: {flp: 1}}}\n", "unknown key 'data.sample.augment.flp'; the nearest valid",
    ),
    "no number": ("optimizer: {learning_rate: .nan}\n", "'optimizer.learning_rate' is nan"),
    "no end": ("optimizer: {eps: .inf}\n", "'optimizer.eps' is inf"),
    "no number in a list": ("logging: {grid_guidance: [1, .nan]}\n", "'logging.grid_guidance' is nan"),
    "too many digits": ("trainer: {max_steps: 1" + "0" * 40 + "}\n", "'trainer.max_steps' is 1000"),
    "a negative seed": ("seed: -1\n", "'seed' is -1; it must be between 0 and"),
    "no levels": ("model: {unet: {channel_mult: []}}\n", "'model.unet.channel_mult' is []"),
    "two means": ("model: {exemplar_encoder: {mean: [0, 0]}}\n", "it must be three numbers"),
    "no value yet": ("seed: ???\n", "'seed' has no value"),
    "a reference to nowhere": ("seed: ${nowhere}\n", "nowhere"),
    "a reference to itself": ("seed: ${seed}\n", "some.yaml"),
    "half a reference": ("output_dir: ${\n", "some.yaml"),
    "a base that is a list": ("base: [a]\n", "'base' is the path of a configuration"),
    "a base that is a number": ("base: 3\n", "'base' is the path of a configuration"),
    "a base that is a reference": ("base: ${a}\n", "base"),
    "both lengths": ("trainer: {max_steps: 3, max_epochs: 2}\n", "both 'trainer.max_steps' and"),
    "no length": ("trainer: {max_steps: 0}\n", "one of them must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name: str):
    content, words = FILES[name]
    path = written(tmp_path, content)
    message = refused(path)
    assert str(path) in message
    assert words in message


def test_a_folder_is_no_configuration(tmp_path):
    assert "it is a folder" in refused(tmp_path)


def test_a_byte_order_mark_and_references_are_read(tmp_path):
    text = "data: {image_size: &size 64}\nmodel: {image_size: *size}\nseed: 7\n"
    config = load_config(written(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert (config.seed, config.model.image_size) == (7, 64)


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n", "---\n", "null\n", "{}\n"])
def test_an_empty_file_is_the_defaults(tmp_path, content: str):
    assert load_config(written(tmp_path, content)) == Config()


ODD = [
    "my data [v2]/{a,b} (1) é",
    "[x]",
    "{a",
    "a: b",
    "a #b",
    "*x",
    "&x",
    "!x",
    "%x",
    "@x",
    "- x",
    "x=y",
    "1e3",
    "'x",
]


@pytest.mark.parametrize("text", ODD[:-1])
@pytest.mark.parametrize("key", ["output_dir", "data.train_shards", "logging.run_name"])
def test_a_text_is_taken_as_it_stands(tmp_path, key: str, text: str):
    config = load_config(written(tmp_path, ""), [f"{key}={text}"])
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == text


def test_a_text_in_quotes_is_what_is_in_them(tmp_path):
    path = written(tmp_path, "")
    assert load_config(path, ["output_dir='a b'"]).output_dir == "a b"
    assert load_config(path, ['output_dir="12"']).output_dir == "12"
    assert load_config(path, ["init_from=''"]).init_from == ""
    assert "not valid YAML" in refused(path, f"output_dir={ODD[-1]}")


@pytest.mark.parametrize("key", PATHS)
def test_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch, key: str):
    monkeypatch.setenv("HOME", "/home/me")
    lines: Any = "~/some/place"
    for name in reversed(key.split(".")):
        lines = {name: lines}
    by_file = written(tmp_path, yaml.safe_dump(lines))
    for config in (
        load_config(by_file),
        load_config(written(tmp_path, "", "b.yaml"), [f"{key}=~/some/place"]),
    ):
        found: Any = to_dict(config)
        for name in key.split("."):
            found = found[name]
        assert found == "/home/me/some/place"


def test_a_tilde_of_nobody_is_refused(tmp_path):
    path = written(tmp_path, "output_dir: ~no-such-person/run\n")
    assert "no home folder of that name is known" in refused(path)


def test_the_length_that_is_named_last_holds(tmp_path):
    steps = written(tmp_path, "trainer: {max_steps: 7}\n", "steps.yaml")
    epochs = written(tmp_path, "base: steps.yaml\ntrainer: {max_epochs: 2}\n", "epochs.yaml")

    def lengths(path: Path, *overrides: str) -> tuple[int, int]:
        options = load_config(path, list(overrides)).trainer
        return options.max_steps, options.max_epochs

    assert lengths(steps) == (7, 0)
    assert lengths(steps, "trainer.max_epochs=3") == (0, 3)
    assert lengths(epochs) == (0, 2)
    assert lengths(epochs, "trainer.max_steps=5") == (5, 0)
    assert lengths(epochs, "seed=1") == (0, 2)
    assert "override 'trainer.max_steps=5': both" in refused(
        steps, "trainer.max_epochs=3", "trainer.max_steps=5"
    )
    config = load_config(epochs)
    save_yaml(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_paper_starts_from_stable_diffusion_unless_it_is_told_not_to():
    paper = CONFIGS / "paper.yaml"
    config = load_config(paper)
    assert config.start
    assert (config.trainer.max_steps, config.trainer.max_epochs) == (0, 40)
    message = refused(paper, "init_from=")
    assert "'init_from' is empty, and was 'checkpoints/warm_start'" in message
    assert "init_from=none for random weights" in message
    assert load_config(paper, ["init_from=none"]).start == ""
    assert load_config(CONFIGS / "toy.yaml", ["init_from="]).start == ""


def test_a_configuration_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    save_yaml(Config(seed=1), path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pbe.files.os.replace", full)
    with pytest.raises(UserError, match=r"cannot write '.*config\.yaml': No space left"):
        save_yaml(Config(seed=2), path)
    assert path.read_bytes() == before


# Whatever stands in a file or behind a command is a configuration or one line.
STRANGE = [
    None, True, -1, 0, 3, 2**70, 0.5, -0.5, float("nan"), float("inf"), "", "text", "~", "${x}", "???", "1e3",
    [], [1], ["a", None], [[1]], {}, {"a": 1}, {"a": {"b": []}}, {1: 2}, "\u0000", "é\u2028", b"\x00\xff",
]  # fmt: skip


def leaves(section: Any = Config, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(section):
        made = item.default_factory() if item.default is dataclasses.MISSING else item.default
        if dataclasses.is_dataclass(made):
            yield f"{prefix}{item.name}"
            yield from leaves(type(made), f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def holds(path: Path, *overrides: str) -> None:
    """A configuration, or one line that names the file or the override."""
    try:
        assert isinstance(load_config(path, list(overrides)), Config)
    except UserError as error:
        text = str(error)
        assert "\n" not in text
        assert str(path) in text or any(override in text for override in overrides), text


def one_strange_value(draw: random.Random, folder: Path) -> Path:
    key, content = draw.choice(list(leaves())), draw.choice(STRANGE)
    names = [*key.split("."), *draw.choices(["", "x", "seed"], k=draw.randrange(2))]
    for name in reversed([name for name in names if name]):
        content = {name: content}
    return written(folder, yaml.dump(content, allow_unicode=True))


def damaged(draw: random.Random, folder: Path) -> Path:
    source = draw.choice(
        [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "ablations"]
    )
    content = bytearray(source.read_bytes())
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(content))
        change = draw.randrange(4)
        if change == 0:
            content[at] = draw.randrange(256)
        elif change == 1:
            del content[at : at + draw.randrange(1, 40)]
        elif change == 2:
            content[at:at] = draw.choice(
                [b"\t", b": ", b"- ", b"\n", b"&a ", b"*a", b"{", b"]", b"'", b"!!set "]
            )
        else:
            content[at:at] = content[at : at + draw.randrange(80)]
    return written(folder, bytes(content))


def override(draw: random.Random) -> str:
    key = draw.choice([*leaves(), "".join(draw.choices(string.printable, k=draw.randrange(8)))])
    shape = draw.choice(["{}", "{}", "{}.x", "{}[0]", ".{}", "{}..", "[{}]"])
    value = draw.choice(
        [str(draw.choice(STRANGE)), "".join(draw.choices(string.printable, k=draw.randrange(12)))]
    )
    text = f"{shape.format(key)}{draw.choice(['=', '=', '=', '==', ':'])}{value}"
    return " ".join(text.split())  # as it is shown


def fuzz(draw: random.Random, folder: Path) -> None:
    kind = draw.randrange(3)
    if kind == 2:
        holds(written(folder, ""), override(draw))
    else:
        holds((one_strange_value if kind else damaged)(draw, folder))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_written_is_a_configuration_or_one_line(tmp_path, seed: int):
    draw = random.Random(seed)
    for _ in range(12):
        fuzz(draw, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_great_deal_that_is_written_is_a_configuration_or_one_line(tmp_path, seed: int):
    draw = random.Random(seed)
    for _ in range(100):
        fuzz(draw, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("key", list(leaves()))
def test_every_field_takes_its_kind_or_says_so(tmp_path, key: str):
    for strange in STRANGE:
        content: Any = strange
        for name in reversed(key.split(".")):
            content = {name: content}
        holds(written(tmp_path, yaml.dump(content, allow_unicode=True)))
        holds(written(tmp_path, ""), " ".join(f"{key}={strange}".split()))
