"""Set distances against closed forms, scipy and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from pbe.errors import UserError
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.sets import (
    Distance,
    frechet,
    frechet_distance,
    kernel,
    leave_groups_out,
)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    return kernel(a, b, Bootstrap(set_resamples=2)).value


def exact(mean: list[float], deviation: list[float]) -> np.ndarray:
    """Features whose sample mean and (diagonal) sample covariance are exactly those given."""
    width = len(mean)
    rows = np.concatenate([np.eye(width), -np.eye(width)]) * np.sqrt((2 * width - 1) / 2)
    return rows * np.array(deviation) + np.array(mean)


def test_diagonal_gaussians_by_hand():
    a, b = exact([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), exact([3.0, 1.0, -2.0], [4.0, 2.0, 1.0])
    means, deviations = 3**2 + 0 + 4**2, (1 - 4) ** 2 + 0 + (3 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(means + deviations)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("n", "m", "width"), [(60, 80, 5), (200, 90, 40)])
def test_frechet_distance_is_scipys_and_torch_fidelitys(n, m, width):
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(width, width))
    a, b = rng.normal(size=(n, width)) @ mix, rng.normal(size=(m, width)) * 2 + 0.5
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + traces - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(fidelity, rel=1e-8)


def test_fewer_images_than_features_is_torch_fidelitys():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(12, 30)), rng.normal(size=(15, 30)) + 1
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(fidelity, rel=1e-5)


def test_kernel_distance_is_torch_fidelitys_over_one_subset_of_all():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(50, 16)).astype(np.float32) + 0.3
    options = {"kid_subsets": 1, "kid_subset_size": 50, "verbose": False, "rng_seed": 0}
    found = kid_features_to_metric(
        torch.from_numpy(a).double(),
        torch.from_numpy(b).double(),
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        **options,
    )
    assert kernel_distance(a, b) == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-9)


def test_kernel_distance_is_unbiased_and_takes_sets_of_two_sizes():
    rng = np.random.default_rng(3)
    same = [kernel_distance(rng.normal(size=(20, 4)), rng.normal(size=(35, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)


@pytest.mark.parametrize("measure", [frechet, kernel])
@pytest.mark.parametrize(("count", "width"), [(150, 3), (40, 90)])
def test_standard_error_is_that_of_fresh_samples(measure, count, width):
    """With more and with fewer images than features."""
    rng = np.random.default_rng(4)
    real = rng.normal(size=(400, width))
    bootstrap = Bootstrap(set_resamples=50)
    fresh = [
        measure(rng.normal(size=(count, width)) + 0.5, real, Bootstrap(set_resamples=2)).value
        for _ in range(60)
    ]
    errors = [measure(rng.normal(size=(count, width)) + 0.5, real, bootstrap).error for _ in range(5)]
    assert np.mean(errors) == pytest.approx(np.std(fresh), rel=0.35)


def test_the_frechet_error_is_the_jackknife_of_the_distance():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(25, 6)), rng.normal(size=(40, 6)) + 1
    left = [frechet_distance(np.delete(a, i, axis=0), b) for i in range(25)]
    found = frechet(a, b, Bootstrap(seed=7, set_resamples=50))  # more groups than rows: one by one
    assert found.error == pytest.approx(np.sqrt(24 / 25 * np.sum((left - np.mean(left)) ** 2)), rel=1e-6)
    groups = list(leave_groups_out(25, 5, 7))
    assert [int(kept.sum()) for kept in groups] == [20] * 5
    assert np.all(np.sum(groups, axis=0) == 4)  # every row is left out once
    left = [frechet_distance(a[kept], b) for kept in groups]
    found = frechet(a, b, Bootstrap(seed=7, set_resamples=5))
    assert found.error == pytest.approx(np.sqrt(4 / 5 * np.sum((left - np.mean(left)) ** 2)), rel=1e-6)


def test_a_distance_has_no_interval_below_zero():
    a = np.random.default_rng(6).normal(size=(40, 8))
    low, high = frechet(a, a, Bootstrap()).interval(0.95)
    assert low == 0.0
    assert high > 0.0
    assert np.isnan(frechet(a[:2], a, Bootstrap()).interval(0.95)).all()


def test_interval_is_the_normal_one():
    assert Distance(10.0, 2.0).interval(0.95) == pytest.approx((10 - 3.92, 10 + 3.92), abs=1e-3)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance])
def test_bad_features_are_refused(measure):
    good = np.random.default_rng(6).normal(size=(5, 3))
    with pytest.raises(UserError, match="at least two images; the edits have 1"):
        measure(good[:1], good)
    with pytest.raises(UserError, match="at least two images; the reference images have 0"):
        measure(good, good[:0])
    with pytest.raises(UserError, match="of the edits are not finite"):
        measure(np.where(good > 0, np.nan, good), good)
    with pytest.raises(UserError, match="of 3 and of 2 numbers"):
        measure(good, good[:, :2])
