"""How fast SpecAugment of a batch is beside a loop over its clips. Run with ``-m benchmark -s``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from respiro.transforms.augment import SpecAugment

pytestmark = pytest.mark.benchmark

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])]


def seconds(compute: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    compute().sum().item()  # waits for the device
    return time.perf_counter() - started


def clip_by_clip(features: Tensor) -> Tensor:
    """Policy ``icbhi_ast_sup`` as one writes it for a single spectrogram."""
    clips = []
    for clip in features:
        masked = clip.clone()
        fill = masked.mean()
        for _ in range(2):
            width = int(torch.rand(()) * 48)
            start = int(torch.randint(0, clip.shape[1] - width + 1, ()))
            masked[:, start : start + width] = fill
        fill = masked.mean()
        for _ in range(2):
            width = int(torch.rand(()) * 160)
            start = int(torch.randint(0, clip.shape[0] - width + 1, ()))
            masked[start : start + width] = fill
        clips.append(masked)
    return torch.stack(clips)


@pytest.mark.parametrize("device", DEVICES)
def test_spec_augment(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    features = torch.randn(64, 798, 128, device=device)
    augment = SpecAugment("icbhi_ast_sup")
    assert augment(features).shape == clip_by_clip(features).shape  # warms both up
    pairs = [(seconds(lambda: clip_by_clip(features)), seconds(lambda: augment(features))) for _ in range(15)]
    clip_wise, batched = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"\nSpecAugment icbhi_ast_sup, 64 spectrograms of 798 x 128, {device}, {torch.get_num_threads()} threads")
    print(f"  loop, clip by clip:   {clip_wise * 1e3:7.1f} ms")
    print(f"  SpecAugment, batched: {batched * 1e3:7.1f} ms ({clip_wise / batched:.1f} times as fast)")
