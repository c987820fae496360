"""How fast the loader delivers, and what Lightning costs beside a bare loop. Run with ``-m benchmark -s``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from respiro.datamodules import ICBHIDataModule
from respiro.datasets import ICBHI
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
    data = ICBHI(shared("data/icbhi_4k"), split="train")
    data.prepare()
    sum(len(data.store[row].samples) for row in range(len(data)))
    print(f"\nloader, {len(data)} cycles of 8 s at 16 kHz, batch 32, shuffled")
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=workers)
        per_second(loader)  # warm: pages in memory
        print(f"  {workers} workers: {per_second(loader):7.0f} cycles/s")


class _Timer(Callback):
    """Times the steps of every epoch but the first."""

    seconds = 0.0
    steps = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch > 0:
            self.seconds += time.perf_counter() - self.started
            self.steps += trainer.num_training_batches


def test_lightning_beside_a_bare_loop(icbhi_root: Path) -> None:
    """The two take turns, so that a change of the machine's load meets both."""
    data = ICBHIDataModule(icbhi_root, batch_size=16, duration=4.0)
    data.prepare_data()
    data.setup("fit")
    rounds, steps = 4, 6
    bare = lightning = 0.0
    for _ in range(rounds):
        seed_everything(0, verbose=False)
        timer = _Timer()
        trainer = Trainer(
            max_epochs=2,
            limit_train_batches=steps,
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
        lightning += timer.seconds / timer.steps
        bare += _bare_loop(data, steps)
    print(
        f"\nCNN6, batch 16 of 4 s: bare loop {bare / rounds * 1e3:.0f} ms/step, "
        f"Lightning {lightning / rounds * 1e3:.0f} ms/step, ratio {lightning / bare:.3f}"
    )


def _bare_loop(data: ICBHIDataModule, steps: int) -> float:
    seed_everything(0, verbose=False)
    model = SoundClassifier(CNN6(), loss=CrossEntropy())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for epoch in range(2):
        started = time.perf_counter()
        for number, batch in enumerate(data.train_dataloader()):
            if number == steps:
                break
            loss = model.loss(model(batch["waveform"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch == 1:
            seconds = time.perf_counter() - started
    return seconds / steps
