"""How fast the loader delivers, and what Lightning costs beside a bare loop. Run with ``-m benchmark -s``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from respiro.datamodules import ICBHIDataModule
from respiro.datasets import ICBHI, write_synthetic_icbhi
from respiro.losses import CrossEntropy
from respiro.methods import SoundClassifier
from respiro.models import CNN6

pytestmark = pytest.mark.benchmark


def per_second(batches: Any) -> float:
    started, cycles = time.perf_counter(), 0
    for batch in batches:
        cycles += len(batch["label"])
    return cycles / (time.perf_counter() - started)


def test_loader(shared: Callable[[str], Path]) -> None:
    root = shared("data/icbhi_4k")
    ICBHI(root).prepare()
    started = time.perf_counter()
    data = ICBHI(root)
    data[0]
    seconds = time.perf_counter() - started
    print(f"\nwarm start of {len(data.all_cycles)} cycles, tables to the first sample: {seconds:.2f} s")
    sum(len(data.store[row].samples) for row in range(len(data)))
    print(f"loader, {len(data)} cycles of 8 s at 16 kHz, batch 32, shuffled")
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=workers)
        per_second(loader)  # warm: pages in memory
        print(f"  {workers} workers: {per_second(loader):7.0f} cycles/s")


class _Timer(Callback):
    """Times the second epoch; the first one warms up."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def test_lightning_beside_a_bare_loop(tmp_path: Path) -> None:
    """The two take turns, so that a change of the machine's load meets both."""
    root = write_synthetic_icbhi(tmp_path / "icbhi")
    data = ICBHIDataModule(root, batch_size=16, duration=4.0)
    data.prepare_data()
    data.setup("fit")
    steps = len(data.train_dataloader())
    rounds = [(_bare(data) / steps, _lightning(data) / steps) for _ in range(5)]
    bare, lightning = (median(times) for times in zip(*rounds, strict=True))
    print(f"\nCNN6, batch 16 of 4 s, {steps} steps an epoch, median of {len(rounds)} rounds")
    print(
        f"  bare loop {bare * 1e3:.0f} ms/step, Lightning {lightning * 1e3:.0f} ms/step, ratio {lightning / bare:.3f}"
    )


def _lightning(data: ICBHIDataModule) -> float:
    seed_everything(0, verbose=False)
    timer = _Timer()
    trainer = Trainer(
        max_epochs=2,
        limit_val_batches=0,
        callbacks=[timer],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(SoundClassifier(CNN6()), datamodule=data)
    return timer.seconds


def _bare(data: ICBHIDataModule) -> float:
    seed_everything(0, verbose=False)
    model = SoundClassifier(CNN6(), loss=CrossEntropy())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(2):
        started = time.perf_counter()
        for batch in data.train_dataloader():
            loss = model.loss(model(batch["waveform"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - started
