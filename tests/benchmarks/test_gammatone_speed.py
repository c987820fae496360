"""How fast a batch of gammatone spectrograms is beside scipy's filters in time. Run with ``-m benchmark -s``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from respiro.transforms.gammatone import GammatoneSpectrogram

pytestmark = pytest.mark.benchmark

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Because scipy has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(compute: Callable[[], np.ndarray]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


@pytest.mark.parametrize("device", DEVICES)
def test_gammatone(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    signal = pytest.importorskip("scipy.signal")
    waveform = torch.randn(32, 32000, generator=torch.Generator().manual_seed(0)) * 0.1
    gammatone = GammatoneSpectrogram(center=False).to(device)
    filters = [signal.gammatone(fc, "iir", fs=8000) for fc in gammatone.centres]
    clips, on_device = waveform.double().numpy(), waveform.to(device)
    window = torch.hann_window(512, dtype=torch.float64).numpy() ** 2
    window /= window.sum()

    def filter_bank() -> np.ndarray:
        """Mean power of every filter's output under the window, all clips at a time."""
        bands = []
        for b, a in filters:
            squared = signal.lfilter(b, a, clips) ** 2
            bands.append(np.lib.stride_tricks.sliding_window_view(squared, 512, axis=1)[:, ::208] @ window)
        return np.stack(bands, axis=2)

    def ours() -> np.ndarray:
        energies: np.ndarray = gammatone.energies(on_device).cpu().numpy()  # waits for the device
        return energies

    with torch.no_grad():
        power = 2 * ours() / (512 * np.hanning(513)[:-1] ** 2).sum()
        assert np.median(np.abs(10 * np.log10(power / filter_bank()))) < 1.0  # dB: the same thing
        pairs = [(seconds(filter_bank), seconds(ours)) for _ in range(5)]  # in turns: same load on both
    slow, fast = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"\nGammatone energies, 32 clips of 4 s at 8 kHz, 124 bands, {device}, 1 thread")
    print(f"  scipy, IIR filters in time:    {slow * 1e3:7.1f} ms")
    print(f"  GammatoneSpectrogram, batched: {fast * 1e3:7.1f} ms ({slow / fast:.1f} times as fast)")
