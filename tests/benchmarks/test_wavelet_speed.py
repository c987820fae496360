"""How fast scalograms are beside PyWavelets, and what memory they take. Run with ``-m benchmark -s``.

What is compared takes turns. Run as a script, this file is the process whose memory is measured.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.transforms.wavelet import MorletScalogram

pytestmark = pytest.mark.benchmark

RATE, CLIPS = 8000, 32
PYWT_WAVELET = "cmor2.0-0.954929658551"


def seconds(compute: Callable[[], object]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def by_pywt(features: MorletScalogram, waveform: Tensor) -> Tensor:
    """The same, with its transform at every sample, clip by clip: the means over the frames, no logarithm."""
    pywt = pytest.importorskip("pywt")
    scales = [features.w0 / (2 * math.pi) * RATE / centre for centre in features.centres]
    hop = features.hop_length
    starts = np.maximum(np.arange(1 + waveform.shape[1] // hop) * hop - hop // 2, 0)
    counts = np.diff(np.append(starts, waveform.shape[1]).clip(max=starts[-1] + hop))
    means = []
    for clip in waveform.numpy():
        found, _ = pywt.cwt(clip, scales, PYWT_WAVELET, method="fft")
        amplitude = 2 * np.abs(found) / np.sqrt(scales)[:, None]
        means.append(np.add.reduceat(amplitude[:, : starts[-1] + hop], starts, axis=1) / counts)
    return torch.from_numpy(np.stack(means)).transpose(1, 2)


def peak_of_process(*arguments: str) -> tuple[float, float]:
    """Return how many MB more than the libraries and the waveform a process held at most, and its seconds."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    memory, duration = map(float, done.stdout.split())
    return memory, duration


@pytest.mark.parametrize("duration", [2.0, 9.2])
def test_beside_pywavelets(duration: float) -> None:
    features = MorletScalogram()
    exact = MorletScalogram(normalize="none")
    waveform = 0.1 * torch.randn(CLIPS, int(duration * RATE), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            exact(waveform[:1]).exp().double(), by_pywt(features, waveform[:1]), rtol=0.2, atol=2e-3
        )
        rounds = 5
        single = [
            (
                seconds(lambda: by_pywt(features, waveform[:1])),
                seconds(lambda: features(waveform[:1])),
                seconds(lambda: features.amplitude(waveform[:1])),
            )
            for _ in range(rounds)
        ]
        loop = seconds(lambda: by_pywt(features, waveform))
        batch = statistics.median(seconds(lambda: features(waveform)) for _ in range(rounds))
    pywt, ours, every_sample = (statistics.median(times) for times in zip(*single, strict=True))
    print(f"\n124 scales, 50-2000 Hz, clips of {duration} s at 8 kHz, CPU, {torch.get_num_threads()} threads")
    print(
        f"  one clip:   PyWavelets {pywt * 1e3:7.1f} ms, MorletScalogram {ours * 1e3:7.1f} ms ({pywt / ours:.1f} times as fast)"
    )
    print(
        f"              amplitude at every sample {every_sample * 1e3:7.1f} ms ({pywt / every_sample:.1f} times as fast)"
    )
    print(
        f"  32 clips:   PyWavelets {loop * 1e3:7.0f} ms, MorletScalogram {batch * 1e3:7.1f} ms ({loop / batch:.1f} times as fast)"
    )
    for what in ("forward", "backward"):
        memory, took = peak_of_process(what, str(duration))
        print(
            f"  32 clips, {what:8}: peak memory {memory:6.0f} MB beyond libraries and waveform, {took:.2f} s with warm-up"
        )
        assert memory < 1000


def main(what: str, duration: str) -> None:
    import resource

    def held() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB

    features = MorletScalogram()
    features(torch.randn(1, 300, requires_grad=True)).sum().backward()  # loads what is loaded at the first call
    waveform = 0.1 * torch.randn(CLIPS, int(float(duration) * RATE), requires_grad=what == "backward")
    before, started = held(), time.perf_counter()
    found = features(waveform)
    if what == "backward":
        found.square().sum().backward()
    print(held() - before, time.perf_counter() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
