"""Fine-tuning: adapters and named parts are all that is trained, saved and resumed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pbe.checkpoints.adapters import open_adapter, with_adapters
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import load_model, save_model
from pbe.config import Config
from pbe.errors import UserError
from pbe.models.adapters import layers_of
from pbe.training.latent_cache.settings import settings_of
from pbe.training.run import train
from pbe.training.setup import build_model, make_task
from tests.training.tiny import Watch, checkpoint, crash, differing, logged, run, send, tiny_config, weights

RANK_2 = ("lora.rank=2", "optimizer.learning_rate=1e-2", "optimizer.warmup_steps=0")


def make_base(workshop: Path, folder: Path, seed: int) -> str:
    """Write a model whose residual branches do something, as a trained one's; return what names it."""
    model = load_model(workshop / "autoencoder" / "model")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_model(folder, model)
    return f"init_from={folder}"


@pytest.fixture(scope="module")
def base(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_base(workshop, tmp_path_factory.mktemp("base"), 0)


def folder_of(override: str) -> Path:
    return Path(override.partition("=")[2])


def validations(run_folder: Path) -> dict[int, float]:
    return {step: float(value) for step, name, value in logged(run_folder) if name == "val/loss"}


@pytest.mark.parametrize("kind", ["bf16", "fp32", "int8"])
def test_an_interrupted_run_of_adapters_ends_as_if_it_had_not_been(shards, base, tmp_path, kind: str):
    settings = (base, *RANK_2, f"lora.base={kind}", "trainer.max_steps=7", "trainer.checkpoint_every=2")
    straight = run(tiny_config(shards, tmp_path / "straight", *settings))
    config = tiny_config(shards, tmp_path / "interrupted", *settings)
    assert run(config, Watch(3, crash)) is None
    assert run(config, Watch(5, send(signal.SIGTERM))).stopped_by == signal.SIGTERM
    assert (tmp_path / "interrupted" / "adapter.safetensors").is_file()  # what there is by then
    finished = run(config)
    assert logged(tmp_path / "interrupted") == logged(tmp_path / "straight")
    first, second = load_file(straight.model_dir), load_file(finished.model_dir)
    assert differing(first, second) == []
    assert (
        differing(checkpoint(tmp_path / "straight")["ema"], checkpoint(tmp_path / "interrupted")["ema"]) == []
    )


def test_checkpoints_hold_adapters_alone(shards, base, tmp_path):
    result = run(tiny_config(shards, tmp_path, base, *RANK_2))
    kept, adapter = checkpoint(tmp_path), load_file(result.model_dir)
    names = {f"{name.rpartition('.')[0]}.adapters.0.{name.rpartition('.')[2]}" for name in adapter}
    assert {name.removeprefix("model.") for name in kept["state_dict"]} == names
    assert {name.removeprefix("model.") for name in kept["ema"]} == names
    assert len(kept["optimizer_states"][0]["state"]) == len(names)
    sizes = [(tmp_path / "checkpoints" / "last.ckpt").stat().st_size, result.model_dir.stat().st_size]
    whole = sum(file.stat().st_size for file in folder_of(base).glob("*.safetensors"))
    assert max(sizes) < whole / 10
    assert not (tmp_path / "model").exists()


def test_the_adapter_does_what_training_saw(shards, base, tmp_path):
    """The file, merged into the base, gives the validation loss that the run ended with."""
    settings = (base, *RANK_2, "lora.base=fp32", "trainer.max_steps=4")
    result = run(tiny_config(shards, tmp_path / "adapters", *settings))
    opened = open_checkpoint(folder_of(base))
    merged = with_adapters(opened, [(open_adapter(tmp_path / "adapters"), 1.0)]).read(None)
    save_model(tmp_path / "merged", merged)
    again = (f"init_from={tmp_path / 'merged'}", "optimizer.learning_rate=0", "trainer.max_steps=1")
    run(tiny_config(shards, tmp_path / "again", *again))
    first, second = validations(tmp_path / "adapters"), validations(tmp_path / "again")
    assert second[0] == pytest.approx(first[4], rel=1e-5)
    assert abs(first[0] - first[4]) > 1e-3 * first[0]
    assert open_adapter(result.model_dir).base == str(folder_of(base))


def test_adapters_are_not_resumed_beside_another_base(shards, workshop, base, tmp_path):
    run(tiny_config(shards, tmp_path / "run", base, *RANK_2))
    other = make_base(workshop, tmp_path / "other", 1)
    with pytest.raises(UserError, match="were trained beside other weights than those of"):
        train(tiny_config(shards, tmp_path / "run", other, *RANK_2, "trainer.max_steps=5"))


def test_named_parts_alone_are_trained(shards, base, tmp_path):
    result = run(tiny_config(shards, tmp_path, base, "optimizer.parts=[self_attention,mapper]"))
    before, after = weights(folder_of(base)), weights(result.model_dir)
    layers = layers_of(load_model(folder_of(base)), ["self_attention", "mapper"])
    changed = differing(before, after)
    assert changed
    assert {name.rpartition(".")[0] for name in changed} <= set(layers)


def test_sizes_follow_the_model_that_training_starts_from(shards, base, tmp_path):
    config = tiny_config(shards, tmp_path, base, "model_from_init=true", "data.image_size=48")
    config.model, config.data.exemplar_size = Config().model, 224  # as a file that says nothing of them
    _, found = build_model(config)
    assert (found.model.image_size, found.data.image_size, found.data.exemplar_size) == (48, 48, 32)
    assert found.model.unet == load_model(folder_of(base)).config.unet
    config.data.image_size = 0
    assert build_model(config)[1].data.image_size == 32
    config.data.image_size = 50
    with pytest.raises(UserError, match="must be a multiple of"):
        build_model(config)


def test_a_latent_cache_serves_adapters_too(shards, base, tmp_path):
    config = tiny_config(shards, tmp_path, base, *RANK_2)
    model, config = build_model(config)
    before = settings_of(config, model)
    make_task(config, model)
    assert model.dtype == torch.bfloat16
    assert settings_of(config, model) == before


def test_parts_without_influence_are_refused(shards, base, tmp_path):
    for setting in ("optimizer.parts=[cross_attention_keys]", "lora.targets=[cross_attention_keys]"):
        more = RANK_2 if setting.startswith("lora") else ()
        with pytest.raises(UserError, match="have no influence"):
            train(tiny_config(shards, tmp_path, base, *more, setting))
