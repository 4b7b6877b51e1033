"""What training starts from: what may differ from it, what may not, and how it is said."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from pbe.config import Config
from pbe.errors import UserError
from pbe.training.setup import _merged, find_autoencoder
from tests.training.tiny import tiny_config


@pytest.fixture
def config(tmp_path) -> Config:
    return tiny_config(tmp_path, tmp_path / "run", "init_from=old")


def test_what_shapes_no_weight_is_the_configurations_and_said(config, caplog):
    stored = replace(config.model, image_size=64, prediction="eps")
    with caplog.at_level(logging.INFO, "pbe"):
        merged = _merged(config, stored)
    assert (merged.image_size, merged.prediction) == (32, "v")
    assert caplog.messages == [
        "training starts from 'old' with model.image_size 32 instead of 64; model.prediction v instead of eps"
    ]


def test_scale_factor_and_tower_weights_are_the_models(config, caplog):
    encoder = replace(config.model.exemplar_encoder, pretrained="elsewhere")
    autoencoder = replace(config.model.autoencoder, scale_factor=0.5)
    stored = replace(config.model, exemplar_encoder=encoder, autoencoder=autoencoder)
    with caplog.at_level(logging.INFO, "pbe"):
        assert _merged(config, stored) == stored
    assert caplog.messages == []


def test_every_key_that_differs_is_named(config):
    unet = replace(config.model.unet, model_channels=48, num_heads=4)
    autoencoder = replace(config.model.autoencoder, mask_aware_decoder=True)
    with pytest.raises(UserError) as caught:
        _merged(config, replace(config.model, unet=unet, autoencoder=autoencoder))
    assert str(caught.value) == (
        "the model section of the configuration differs from that of init_from 'old': "
        "model.unet.model_channels 32 instead of 48; model.unet.num_heads 2 instead of 4; "
        "model.autoencoder.mask_aware_decoder False instead of True; make them equal"
    )


@pytest.mark.parametrize("other", ["lora.rank=2", "task=distillation", "optimizer.parts=[residual]"])
def test_no_pooling_is_added_where_it_would_not_be_trained(tmp_path, other):
    wanted = ("init_from=old", "model.exemplar_encoder.layout_grid=2", other)
    config = tiny_config(tmp_path, tmp_path / "run", *wanted)
    encoder = replace(config.model.exemplar_encoder, layout_grid=0)
    with pytest.raises(UserError, match="layout_grid 2 instead of 0; make them equal"):
        _merged(config, replace(config.model, exemplar_encoder=encoder))


def test_an_autoencoder_that_is_not_there(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", f"autoencoder_from={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"autoencoder_from is '.*nowhere', which does not exist; name"):
        find_autoencoder(config)


def test_a_run_leads_to_its_autoencoder(workshop, tmp_path):
    named = f"autoencoder_from={workshop / 'autoencoder'}"
    folder, sizes = find_autoencoder(tiny_config(tmp_path, tmp_path / "run", named))
    assert folder == workshop / "autoencoder" / "model"
    assert sizes.channels == 16
