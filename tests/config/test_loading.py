"""Configuration: what loads, what is refused, and how the line reads that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pbe.config import (
    CHOICES,
    Config,
    ModelConfig,
    ScheduleConfig,
    from_dict,
    load_config,
    save_yaml,
    to_dict,
)
from pbe.errors import UserError

CONFIGS = [
    path
    for path in sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))
    if path.parent.name != "ablations"  # lists of changes to configurations
]
TOY = Path(__file__).resolve().parents[2] / "configs" / "toy.yaml"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return path


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The line that a refused configuration ends in."""
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_empty_file_gives_the_defaults(empty: Path) -> None:
    assert load_config(empty) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_shipped_configurations_load(path: Path) -> None:
    config = load_config(path)
    assert from_dict(Config, to_dict(config)) == config


def test_paper_configuration_is_there() -> None:
    assert "paper.yaml" in [path.name for path in CONFIGS]


def test_base_is_read_first_and_may_have_a_base_itself(tmp_path: Path) -> None:
    written(tmp_path, "deep/grandparent.yaml", "seed: 1\ntask: autoencoder\ndata: {batch_size: 9}\n")
    written(
        tmp_path,
        "parent.yaml",
        "base: deep/grandparent.yaml\nseed: 2\nmodel: {unet: {channel_mult: [1, 3]}}\n",
    )
    child = written(tmp_path, "sub/child.yaml", "base: ../parent.yaml\ndata: {num_workers: 3}\n")
    config = load_config(child, ["data.num_workers=5"])
    assert (config.task, config.seed) == ("autoencoder", 2)
    assert (config.data.batch_size, config.data.num_workers) == (9, 5)
    assert config.model.unet.channel_mult == [1, 3]
    assert config.model.unet.num_heads == ModelConfig().unet.num_heads


def test_bases_in_a_circle(tmp_path: Path) -> None:
    written(tmp_path, "b.yaml", f"base: ../{tmp_path.name}/a.yaml\n")
    assert "its own base" in refused(written(tmp_path, "a.yaml", "base: b.yaml\n"))


def test_missing_base(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(written(tmp_path, "a.yaml", "base: nowhere.yaml\n"))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.max_steps=100", ("trainer", "max_steps", 100)),
        ("optimizer.learning_rate=1e-4", ("optimizer", "learning_rate", 1e-4)),
        ("optimizer.learning_rate=1", ("optimizer", "learning_rate", 1.0)),
        ("output_dir=a=b", ("output_dir", "a=b")),
        ("output_dir=12", ("output_dir", "12")),
        ("logging.loggers=[csv]", ("logging", "loggers", ["csv"])),
        ("model.unet.channel_mult=[1,2,2]", ("model", "unet", "channel_mult", [1, 2, 2])),
        ("data.sample.squash=true", ("data", "sample", "squash", True)),
        ("objective.drop_mode=per_batch", ("objective", "drop_mode", "per_batch")),
    ],
)
def test_overrides(empty: Path, override: str, value: tuple[object, ...]) -> None:
    found: object = load_config(empty, [override])
    for name in value[:-1]:
        found = getattr(found, str(name))
    assert found == value[-1]
    assert type(found) is type(value[-1])


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.yaml", "seed: 1\n")
    assert load_config(path, ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer.max_step", "trainer.max_steps"),
        ("trainer.learning_rate", "optimizer.learning_rate"),
        ("lerning_rate", "optimizer.learning_rate"),
        ("sede", "seed"),
        ("model.unet.num_head", "model.unet.num_heads"),
        ("data.sample.augment.rotat", "data.sample.augment.rotate"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(empty: Path, key: str, nearest: str) -> None:
    message = refused(empty, f"{key}=3")
    assert f"unknown key '{key}'" in message
    assert f"'{nearest}'" in message


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.yaml", "trainer:\n  max_step: 3\n")
    message = refused(path)
    assert message.startswith(str(path))
    assert "'trainer.max_step'" in message
    assert "'trainer.max_steps'" in message


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=abc",
        "trainer.max_steps=1.5",
        "trainer.max_steps=true",
        "trainer.max_steps=null",
        "trainer.max_steps=",
        "trainer.max_steps=[1]",
        "data.sample.squash=maybe",
        "optimizer.learning_rate=fast",
        "model.unet.channel_mult=3",
        "model.unet.channel_mult=[a]",
        "model.unet=null",
        "trainer=5",
        "seed.x=1",
    ],
)
def test_wrong_type_names_the_key(empty: Path, override: str) -> None:
    message = refused(empty, override)
    assert message.startswith(f"override '{override}'")
    assert "None" not in message.replace("Incompatible value 'None'", "")


def test_wrong_type_in_a_file_names_file_and_key(tmp_path: Path) -> None:
    path = written(tmp_path, "a.yaml", "data:\n  batch_size: many\n")
    message = refused(path)
    assert message.startswith(str(path))
    assert "'data.batch_size'" in message
    assert "many" in message


@pytest.mark.parametrize("override", ["trainer.max_steps", "seed:3", ""])
def test_override_without_equals_sign(empty: Path, override: str) -> None:
    assert "not of the form key=value" in refused(empty, override)


@pytest.mark.parametrize("override", ["seed=[1", "seed={a", 'output_dir="a'])
def test_override_whose_value_is_no_yaml(empty: Path, override: str) -> None:
    assert "not valid YAML" in refused(empty, override)


@pytest.mark.parametrize("override", ["output_dir=${nowhere}", "output_dir=${oc.env:PBE_NO_SUCH_VARIABLE}"])
def test_interpolation_that_leads_nowhere(empty: Path, override: str) -> None:
    refused(empty, override)


def test_one_value_may_refer_to_another(empty: Path) -> None:
    assert (
        load_config(
            empty, ["trainer.max_steps=7", "optimizer.warmup_steps=${trainer.max_steps}"]
        ).optimizer.warmup_steps
        == 7
    )


@pytest.mark.parametrize("key", CHOICES)
def test_bad_choice_names_key_and_choices(empty: Path, key: str) -> None:
    message = refused(empty, f"{key}=nonsense")
    assert f"'{key}' is 'nonsense'" in message
    assert all(choice in message for choice in CHOICES[key])


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_accepted(empty: Path, key: str) -> None:
    for choice in CHOICES[key]:
        load_config(empty, [f"{key}={choice}", "init_from=model"])  # which distillation starts from


def test_defaults_are_among_the_choices() -> None:
    values = to_dict(Config())
    for key, allowed in CHOICES.items():
        found = values
        for name in key.split("."):
            found = found[name]
        assert found in allowed


def test_missing_file(tmp_path: Path) -> None:
    assert "no configuration file at" in refused(tmp_path / "nowhere.yaml")
    assert "no configuration file at" in refused(tmp_path)


@pytest.mark.parametrize(
    "text", ["a: [1,\n b: }", "trainer:\n\tmax_steps: 1\n", "seed: 1\nseed: 2\n", "seed: 'x"]
)
def test_invalid_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, "bad.yaml", text)
    message = refused(path)
    assert message.startswith(f"{path}: not valid YAML")


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "not valid YAML" in refused(path)


def test_file_that_is_no_mapping(tmp_path: Path) -> None:
    assert "mapping" in refused(written(tmp_path, "list.yaml", "- a\n- b\n"))


def test_round_trip_through_json() -> None:
    config = Config(seed=5)
    config.model.unet.channel_mult = [1, 2, 3]
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_round_trip_through_yaml(tmp_path: Path, empty: Path) -> None:
    config = load_config(
        empty, ["seed=5", "model.unet.channel_mult=[1,2]", "optimizer.eps=1e-9", "output_dir='12'"]
    )
    save_yaml(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_dictionaries_are_checked_as_strictly_as_files() -> None:
    with pytest.raises(UserError, match=r"place: unknown key 'unet.model_chanels'.*'unet.model_channels'"):
        from_dict(ModelConfig, {"unet": {"model_chanels": 1}}, "place")
    with pytest.raises(UserError, match="wrong value for 'image_size'"):
        from_dict(ModelConfig, {"image_size": "large"})
    with pytest.raises(UserError, match=r"'prediction' is 'x0'; it must be one of eps, v"):
        from_dict(ModelConfig, {"prediction": "x0"})
    assert from_dict(ScheduleConfig, {"timesteps": 10}).timesteps == 10


def test_partial_dictionary_keeps_the_other_defaults() -> None:
    assert from_dict(ModelConfig, {"image_size": 64}) == ModelConfig(image_size=64)


def test_an_override_without_a_value_is_an_empty_text() -> None:
    config = load_config(TOY, ["data.validation_shards="])
    assert config.data.validation_shards == ""
    with pytest.raises(UserError, match=r"wrong value for 'trainer\.max_steps'"):
        load_config(TOY, ["trainer.max_steps="])
