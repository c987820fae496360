"""Front end and SpecAugment against the released code of Moummad and Farrugia, the masks by their statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from respiro.transforms import LogMelSpectrogram, SpecAugment

CLIPS, GATES = 12000, 20000


def test_front_end_has_the_released_filters_and_powers(golden: Path) -> None:
    front = np.load(golden / "scl" / "frontend.npz")
    features = LogMelSpectrogram(normalize="none")
    np.testing.assert_allclose(features._filters, front["mel_fb"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(features._window, front["window"], rtol=0, atol=1e-6)
    powers = 10 ** (features(torch.from_numpy(front["wave_int16"]) / 32768).double().numpy() / 10)
    theirs = np.maximum(front["mel_power"][:, 0].swapaxes(1, 2), 1e-10)  # the floor of the decibels
    np.testing.assert_allclose(powers, theirs, rtol=1e-3)


@pytest.mark.parametrize("normalize", ["batch_minmax", "clip_minmax"])
def test_fill_of_the_release_is_the_least_of_the_features(golden: Path, normalize: Any) -> None:
    front = np.load(golden / "scl" / "frontend.npz")
    features = LogMelSpectrogram(normalize=normalize)(torch.from_numpy(front["wave_int16"]) / 32768)
    augment = SpecAugment("icbhi_sup", time_width=40, fill=-14.47, to_end=False)
    masked = augment(features, Generator().manual_seed(0))
    assert (masked == -14.47).any((1, 2)).all()
    assert masked.min().item() == pytest.approx((0 - float(front["mean"])) / float(front["std"]), abs=1e-3)


@pytest.fixture(scope="module")
def expected(golden: Path) -> Any:
    return np.load(golden / "scl" / "specaugment_stats.npz")


@pytest.fixture(scope="module")
def hidden(expected: Any) -> np.ndarray:
    """Which cells of ``CLIPS`` clips are masked ``(B, T, F)``."""
    mels, frames = expected["shape"].tolist()
    augment, generator = SpecAugment("icbhi_sup", time_width=40, fill=0.0, to_end=False), Generator().manual_seed(0)
    assert (augment.freq_width, augment.time_width) == (expected["freq_mask"], expected["time_mask"])
    assert (augment.freq_masks, augment.time_masks) == (expected["freq_stripes"], expected["time_stripes"])
    ones = torch.ones(1000, frames, mels)
    return torch.cat([augment(ones, generator) == expected["fill_value"] for _ in range(CLIPS // 1000)]).numpy()


@pytest.mark.parametrize(
    ("axis", "name", "tolerance", "probability"),
    [(1, "mels", 0.5, "mel_row_mask_probability"), (2, "frames", 1.0, "frame_mask_probability")],
    ids=["mels", "frames"],
)
def test_masks_hide_as_many_as_the_released_ones(
    expected: Any, hidden: np.ndarray, axis: int, name: str, tolerance: float, probability: str
) -> None:
    whole = hidden.all(axis=axis)  # rows or columns that are masked from end to end
    counts = whole.sum(axis=1)
    assert counts.mean() == pytest.approx(float(expected[f"mean_masked_{name}"]), abs=tolerance)
    np.testing.assert_allclose(whole.mean(axis=0), expected[probability], rtol=0, atol=0.02)
    histogram = np.bincount(counts, minlength=whole.shape[1] + 1) / CLIPS
    theirs = expected[f"hist_masked_{name}"] / float(expected["n_samples"])
    np.testing.assert_allclose(histogram.cumsum(), theirs.cumsum(), rtol=0, atol=0.02)


def test_masks_hide_the_same_share_of_the_cells(expected: Any, hidden: np.ndarray) -> None:
    share = hidden.mean(axis=(1, 2))
    assert share.mean() == pytest.approx(float(expected["zero_fraction_mean"]), abs=0.01)
    assert share.std() == pytest.approx(float(expected["zero_fraction_std"]), abs=0.01)
    quantiles = np.quantile(share, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(quantiles, expected["zero_fraction_quantiles_5_25_50_75_95"], rtol=0, atol=0.01)


def test_gate_per_batch_lets_as_many_batches_through(expected: Any) -> None:
    # So many masks that one of them is certain to have a width.
    augment = SpecAugment("icbhi_sup", gate="normal-batch", fill="zero", freq_masks=9, freq_width=30, time_masks=0)
    batch, generator = torch.ones(2, 1, 30), Generator().manual_seed(0)
    share = np.mean([bool((augment(batch, generator) == 0).any()) for _ in range(GATES)])
    assert share == pytest.approx(float(expected["released_apply_exact_p1.0"]), abs=0.01)
    assert share == pytest.approx(float(expected["released_apply_fraction_p1.0"]), abs=0.01)
