"""QS: the log-likelihood against scikit-learn, and the original's clipping and batches by hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.mixture import GaussianMixture

from pbe.errors import UserError
from pbe.evaluation.metrics.feature_scores import Mixture, fit_mixture, load_mixture, quality


def clusters(n: int = 300, width: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, width)) * 4
    return centres[rng.integers(0, 3, n)] + rng.normal(size=(n, width)) @ rng.normal(size=(width, width))


def test_log_likelihood_is_scikit_learns():
    features = clusters()
    fitted = GaussianMixture(3, random_state=0).fit(features)
    ours = fit_mixture(features, {}, components=3, seed=0)
    far = np.concatenate([features[:20], features[:20] * 50])
    assert ours.log_likelihood(far) == pytest.approx(fitted.score_samples(far), rel=1e-9)


def test_one_standard_gaussian_by_hand():
    mixture = Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None], {})
    expected = [-np.log(2 * np.pi), -np.log(2 * np.pi) - 12.5]
    assert mixture.log_likelihood(np.array([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(expected)


def test_quality_is_clipped_and_scaled_as_the_original():
    assert quality(np.array([-50.0, 0.0, 150.0, 300.0, 900.0])).tolist() == [0.0, 0.0, 50.0, 100.0, 100.0]


def test_a_mixture_comes_back_from_its_file(tmp_path: Path):
    features = clusters()
    mixture = fit_mixture(features, {"weights_sha256": "abc"}, components=2)
    mixture.save(tmp_path / "m.safetensors")
    again = load_mixture(tmp_path / "m.safetensors")
    assert np.array_equal(again.log_likelihood(features), mixture.log_likelihood(features))
    assert again.card == {"weights_sha256": "abc"}


def test_files_that_are_no_mixture_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"pbe fit makes one"):
        load_mixture(tmp_path / "none.safetensors")
    (tmp_path / "coco2017_gmm_k20").write_bytes(pickle.dumps({"means_": 1}))
    with pytest.raises(UserError, match="pickles are not read"):
        load_mixture(tmp_path / "coco2017_gmm_k20")
    mixture = fit_mixture(clusters(), {}, components=2)
    mixture.save(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-9])
    with pytest.raises(UserError, match="cannot be read as a mixture"):
        load_mixture(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "card"),
    [
        ({}, None),
        ({}, "[1]"),
        ({}, "[" * 100_000),
        ({"weights": torch.ones(3, dtype=torch.float64)}, "{}"),
        ({"means": torch.ones(2, dtype=torch.float64)}, "{}"),
        ({"cholesky": torch.ones(2, 4, 3, dtype=torch.float64)}, "{}"),
    ],
    ids=["no card", "card is a list", "card is deep", "weights", "means", "cholesky"],
)
def test_mixtures_of_another_form_are_refused(tmp_path: Path, change: dict, card: str | None):
    shapes = {"weights": (2,), "means": (2, 4), "cholesky": (2, 4, 4)}
    tensors = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()} | change
    about = {"format": "pbe-gaussian-mixture"} | ({} if card is None else {"card": card})
    save_file(tensors, tmp_path / "m.safetensors", metadata=about)
    with pytest.raises(
        UserError, match=r"m\.safetensors' (was not made by pbe fit|cannot be read as a mixture)"
    ):
        load_mixture(tmp_path / "m.safetensors")


def test_a_mixture_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None], {}).save(tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_fit_that_fails_is_one_line(monkeypatch):
    def fail(self, features):
        raise ValueError("ill-defined empirical covariance")

    monkeypatch.setattr(GaussianMixture, "fit", fail)
    with pytest.raises(UserError, match=r"the fit fails; .*: ill-defined"):
        fit_mixture(clusters(), {}, components=2)


def test_bad_features_are_refused():
    features = clusters()
    with pytest.raises(UserError, match="20 components need more than 5 images"):
        fit_mixture(features[:5], {})
    with pytest.raises(UserError, match="not finite"):
        fit_mixture(np.where(features > 0, np.nan, features), {}, components=2)
    with pytest.raises(UserError, match="of 4 numbers an image, the features are of 3"):
        fit_mixture(features, {}, components=2).log_likelihood(features[:, :3])
