"""How fast the quality of a data set is measured beside one clip after the other. Run with ``-m benchmark -s``.

The clips are noise of lengths like those of ICBHI's cycles: 0.2 s to 16 s, 2.7 s on average. The whole set is measured
for real, through the store, on all cores; the plain ways take a share of it, and their time is scaled.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from respiro.store import QualityStore
from respiro.transforms import AudioQuality

pytestmark = pytest.mark.benchmark

CYCLES, RATE, SHARE, ROUNDS = 6898, 16000, 60, 3
WINDOW = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), 56)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For the plain ways and the batch; the store has its own, one a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    seconds = rng.lognormal(sigma=0.6, size=CYCLES)
    seconds = np.clip(seconds * 2.7 / seconds.mean(), 0.2, 16)
    noise = rng.standard_normal(17 * RATE + CYCLES, dtype="float32") * np.float32(0.1)
    return [noise[number : number + round(length * RATE)] for number, length in enumerate(seconds)]


def by_frame(clip: np.ndarray) -> list[float]:
    """A loop over frames, in numpy."""
    padded = np.pad(clip, (0, max(0, 512 - len(clip))))
    entropies = []
    for start in range(0, len(padded) - 511, 160):
        frame = padded[start : start + 512] * WINDOW
        if np.sqrt((frame**2).sum() / 400) >= 1e-5:
            power = np.abs(np.fft.rfft(frame)) ** 2
            share = power / power.sum()
            entropies.append(-(share * np.log(np.maximum(share, 1e-38))).sum() / np.log(257))
    return [float(np.mean(entropies)) if entropies else 1.0, float(np.sqrt((clip**2).mean()))]


def by_clip(clip: np.ndarray) -> list[float]:
    """``torch.stft`` of a clip."""
    x = torch.from_numpy(clip)
    padded = torch.nn.functional.pad(x, (0, max(0, 512 - len(x))))
    window = torch.hann_window(400)
    power = torch.stft(padded, 512, 160, 400, window, center=False, return_complex=True).abs() ** 2
    share = power / power.sum(0)
    entropies = torch.special.entr(share).sum(0) / np.log(257)
    return [float(entropies.mean()), float(x.square().mean().sqrt())]


def seconds(compute: Callable[[], object]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def test_one_thread(clips: list[np.ndarray]) -> None:
    quality = AudioQuality(RATE)
    some = clips[:: CYCLES // SHARE]

    def ours(clip: np.ndarray) -> list[float]:
        found: list[float] = quality.measure(torch.from_numpy(clip)[None])[0].tolist()
        return found

    ways = {"numpy, frame by frame": by_frame, "torch.stft, clip by clip": by_clip, "AudioQuality, clip by clip": ours}
    measures = [np.array([way(clip) for clip in some]) for way in ways.values()]  # the same thing, and a warm start
    np.testing.assert_allclose(measures[0], measures[2], atol=1e-4)
    np.testing.assert_allclose(measures[1], measures[2], atol=1e-4)
    rounds = [[seconds(lambda way=way: [way(clip) for clip in some]) for way in ways.values()] for _ in range(ROUNDS)]  # type: ignore[misc]
    times = [statistics.median(way) for way in zip(*rounds, strict=True)]  # in turns: same load on all
    scale = sum(map(len, clips)) / sum(map(len, some))
    print(f"\nEntropy and RMS of {len(some)} clips, 1 thread, and scaled to {CYCLES}")
    for label, taken in zip(ways, times, strict=True):
        print(f"  {label:<27} {1e3 * taken:8.1f} ms {scale * taken:7.1f} s ({taken / times[-1]:.1f} times ours)")


def test_the_whole_set(clips: list[np.ndarray], tmp_path: Path) -> None:
    quality = AudioQuality(RATE)

    def build(number: int) -> QualityStore:
        names = [str(row) for row in range(CYCLES)]
        how = quality.measure, quality.measure_spec()
        return QualityStore.open(clips.__getitem__, names, {"n": number}, *how, cache_dir=tmp_path, progress=False)

    cold = [seconds(lambda number=number: build(number)) for number in range(ROUNDS)]  # type: ignore[misc]
    warm = seconds(lambda: build(0))
    store = build(0)
    score = seconds(
        lambda: (quality.fit(torch.from_numpy(store.values[:, 1])), quality.score(torch.from_numpy(store.values)))
    )
    hours = sum(map(len, clips)) / RATE / 3600
    print(f"\n{CYCLES} cycles, {hours:.1f} h of sound at {RATE} Hz, {os.cpu_count()} cores")
    print(f"  store, cold build:          {statistics.median(cold):8.2f} s ({min(cold):.2f} to {max(cold):.2f})")
    print(f"  store, warm open:           {1e3 * warm:8.1f} ms")
    print(f"  percentiles and all scores: {1e3 * score:8.1f} ms")
    assert statistics.median(cold) < 60
