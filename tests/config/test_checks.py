"""Numbers out of range and sizes that do not fit are one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbe.config import RANGES, Config, load_config
from pbe.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(CONFIGS / "toy.yaml", list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("key", RANGES)
def test_a_number_out_of_range_names_key_and_limits(key: str) -> None:
    low, _ = RANGES[key]
    text = message(f"{key}={int(low) - 2}")
    assert key in text
    assert f"{low:g}" in text
    assert "\n" not in text


@pytest.mark.parametrize("key", [key for key, (_, high) in RANGES.items() if high == 1])
def test_a_share_above_one_is_refused(key: str) -> None:
    assert f"'{key}' is 2" in message(f"{key}=2")


def test_every_range_is_of_a_key_that_exists() -> None:
    for key in RANGES:
        section: object = Config()
        for part in key.split("."):
            section = getattr(section, part)
        assert isinstance(section, int | float)


def test_two_betas_are_wanted() -> None:
    assert "two numbers" in message("optimizer.betas=[0.9]")
    assert "two numbers" in message("optimizer.betas=[0.9, 1.0]")


@pytest.mark.parametrize(
    "override",
    ["model.unet.channel_mult=[[1]]", "optimizer.betas=[[0.9],0.9]", "logging.loggers=[{a: b}]"],
)
def test_a_list_holds_values_not_lists(override: str) -> None:
    assert f"'{override.split('=')[0]}' is" in message(override)


def test_a_run_needs_a_folder() -> None:
    assert "'output_dir' is empty" in message("output_dir=")


def test_data_and_model_must_agree_on_sizes() -> None:
    assert "must be equal" in message("data.image_size=128")
    assert "must be equal" in message("data.exemplar_size=64")


def test_the_image_must_halve_evenly() -> None:
    assert "multiple of" in message("model.image_size=65", "data.image_size=65")


def test_the_defaults_pass() -> None:
    assert load_config(CONFIGS / "paper.yaml").model.image_size == 512


LORA = ("lora.rank=4", "init_from=toy")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ("optimizer.parts=[attention]",),
            "'optimizer.parts' names 'attention'; there are: self_attention, ",
        ),
        ((*LORA, "lora.targets=[mappers]"), "'lora.targets' names 'mappers'"),
        ((*LORA, "lora.targets=[]"), "'lora.targets' is empty"),
        ((*LORA, "optimizer.parts=[mapper]"), "set one of them"),
        (("lora.rank=4",), "'lora.rank' adapts a trained model; name it in 'init_from'"),
        ((*LORA, "trainer.precision=bf16-true"), "with lora.base=bf16 for a base in bfloat16"),
        ((*LORA, "trainer.strategy=fsdp2"), "use ddp"),
        ((*LORA, "task=autoencoder"), "'lora.rank' is for task=diffusion"),
        (("optimizer.parts=[mapper]", "task=autoencoder"), "'optimizer.parts' is for task=diffusion"),
        (("model_from_init=true",), "'model_from_init' takes the sizes of a model"),
        (("data.prior_shards=a",), "cannot be used with a latent cache; set cache.folder="),
    ],
)
def test_fine_tuning_that_cannot_be_is_refused(overrides: tuple[str, ...], text: str) -> None:
    assert text in message(*overrides)


def test_sizes_that_follow_the_start_need_not_fit_yet() -> None:
    config = load_config(CONFIGS / "toy.yaml", ["model_from_init=true", "init_from=toy", "data.image_size=0"])
    assert (config.data.image_size, config.model.image_size) == (0, 64)
