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
from pathlib import Path

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
    """The mean amplitude of each frame, from the transform at every sample, clip by clip."""
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
    batch = 0.1 * torch.randn(CLIPS, int(duration * RATE), generator=torch.Generator().manual_seed(0))
    clip = batch[:1]
    works: dict[str, Callable[[], object]] = {
        "PyWavelets": lambda: by_pywt(features, clip),
        "MorletScalogram": lambda: features(clip),
        "its amplitude at every sample": lambda: features.amplitude(clip),
        "MorletScalogram of the batch": lambda: features(batch),
    }
    with torch.inference_mode():
        linear = MorletScalogram(normalize="none")(clip).exp().double()
        # PyWavelets attenuates by about sinc(f / rate), 10 % at 2 kHz, and is noisy at low frequencies.
        torch.testing.assert_close(linear, by_pywt(features, clip), rtol=0.15, atol=3e-3)
        rounds = [[seconds(work) for work in works.values()] for _ in range(5)]  # in turns: same load on all
    print(f"\n124 scales, 50-2000 Hz, clips of {duration} s at 8 kHz, CPU, {torch.get_num_threads()} threads, per clip")
    for label, times in zip(works, zip(*rounds, strict=True), strict=True):
        clips = CLIPS if "batch" in label else 1
        ratio = statistics.median(first / time * clips for (first, *_), time in zip(rounds, times, strict=True))
        print(f"  {label:30} {statistics.median(times) / clips * 1e3:8.1f} ms ({ratio:.1f} times as fast)")
    for what in ("forward", "backward"):
        memory, took = peak_of_process(what, str(duration))
        print(f"  batch of {CLIPS}, {what:8}: at most {memory:4.0f} MB beyond libraries and waveform, {took:.2f} s")


def main(what: str, duration: str) -> None:
    import psutil

    features = MorletScalogram()
    features(torch.randn(1, 300, requires_grad=True)).sum().backward()  # loads what is loaded at the first call
    waveform = 0.1 * torch.randn(CLIPS, int(float(duration) * RATE))
    waveform.requires_grad_(what == "backward")
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    found = features(waveform)
    if what == "backward":
        found.square().sum().backward()
    took = time.perf_counter() - started
    # Of this program alone: the peak that ``resource`` gives begins with what its parent held.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print((int(status["VmHWM"].split()[0]) * 1024 - before) / 1e6, took)


if __name__ == "__main__":
    main(*sys.argv[1:])
