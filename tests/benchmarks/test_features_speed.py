"""How fast the Kaldi features of a batch are beside a loop over its clips. Run with ``-m benchmark -s``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from respiro.transforms import KaldiFbank

pytestmark = pytest.mark.benchmark

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])]


def seconds(compute: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    compute().sum().item()  # waits for the device
    return time.perf_counter() - started


@pytest.mark.parametrize("device", DEVICES)
def test_kaldi_fbank(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    waveform = torch.randn(64, 128000, device=device) * 0.1
    features = KaldiFbank(mean=None).to(device)

    def loop() -> Tensor:
        clips = [kaldi.fbank(clip[None], window_type="hanning", num_mel_bins=128, dither=0.0) for clip in waveform]
        return torch.stack(clips)

    with torch.no_grad():
        torch.testing.assert_close(features(waveform), loop(), rtol=0, atol=2e-2)
        pairs = [(seconds(loop), seconds(lambda: features(waveform))) for _ in range(7)]  # in turns: same load on both
    clip_wise, batched = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"\nKaldi features, 64 clips of 8 s at 16 kHz, {device}, {torch.get_num_threads()} threads")
    print(f"  torchaudio, clip by clip: {clip_wise * 1e3:7.1f} ms")
    print(f"  KaldiFbank, batched:      {batched * 1e3:7.1f} ms ({clip_wise / batched:.1f} times as fast)")
