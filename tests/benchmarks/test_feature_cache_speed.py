"""What the front end costs in a training step, computed and read from the cache. Run with ``-m benchmark -s``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from respiro.component import describe
from respiro.datasets import SPRSound, write_synthetic_sprsound
from respiro.losses import CenterLoss, MixedCrossEntropy, MultiObjectiveLoss, TripletLoss
from respiro.methods import InceptionFusion

pytestmark = pytest.mark.benchmark
BATCH = 32


def median(compute: Callable[[], object], rounds: int = 5) -> float:
    """Seconds, after one round that does not count."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        compute()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def test_a_step_with_and_without_the_cache(tmp_path: Path) -> None:
    root = write_synthetic_sprsound(tmp_path / "sprsound", seed=0)
    data = SPRSound(root, task="1-2", sample_rate=8000, duration=4.0, fade="none", partial=True, cache_dir=tmp_path)
    model = InceptionFusion(
        classes=data.classes,
        scoring="sprsound",
        loss=MultiObjectiveLoss(MixedCrossEntropy(), CenterLoss(7, 512), TripletLoss()),
    ).train()
    started = time.perf_counter()
    data.cache_features(model.features, describe(model.features))
    built = time.perf_counter() - started
    optimizer = torch.optim.AdamW(model.parameters())
    model.logged = lambda loss, labels, **terms: loss  # type: ignore[method-assign]

    def read(cached: bool) -> dict[str, Tensor]:
        store = data.feature_store
        if not cached:
            data.feature_store = None
        batch: dict[str, Tensor] = default_collate([data[row] for row in range(BATCH)])
        data.feature_store = store
        return batch

    def network() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model.training_step(batch, 0).backward()
        optimizer.step()

    batch = read(cached=True)
    waveforms = median(lambda: read(cached=False))
    both = median(lambda: read(cached=True))
    with torch.no_grad():
        front = median(lambda: model.features(batch["waveform"]))
    model._cached = True
    step = median(network, rounds=3)
    threads = torch.get_num_threads()
    print(f"\nInceptionFusion, batch {BATCH} of 4 s at 8 kHz, 2 x 124 x 154, bf16, {threads} threads")
    print(f"  network, forward to optimiser:       {step * 1e3:8.1f} ms")
    print(f"  reading waveforms alone:             {waveforms * 1e3:8.1f} ms")
    print(f"  front ends, computed:                {front * 1e3:8.1f} ms ({front / (front + step):.1%} of the step)")
    print(f"  features, from the cache:            {(both - waveforms) * 1e3:8.1f} ms "
          f"({(both - waveforms) / (both + step):.2%} of the step)")  # fmt: skip
    print(f"  filling the cache of {len(data.all_cycles)} cycles: {built:.1f} s")
