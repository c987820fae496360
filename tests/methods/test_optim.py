"""Schedules against the released code's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from respiro.datamodules import ICBHIDataModule
from respiro.methods import SoundClassifier
from respiro.methods._optim import factor
from respiro.models import CNN6


@pytest.mark.parametrize(("name", "warmup"), [("cosine50", 0.0), ("cosine50_warm", 0.2)])
def test_the_schedule_set_once_an_epoch(golden: Path, name: str, warmup: float) -> None:
    expected = np.load(golden / "patchmix" / "schedule_ma.npz")[name]
    epochs, steps = expected.shape
    found = [5e-5 * factor(i, epochs * steps, "epoch-cosine", warmup, 1e-3, epochs) for i in range(epochs * steps)]
    np.testing.assert_allclose(np.reshape(found, expected.shape), expected, rtol=0, atol=1e-12)


def test_the_schedule_that_falls_and_rises(golden: Path) -> None:
    expected = np.load(golden / "scl" / "schedule.npz")
    peak, floor, epochs, steps = 1e-4, float(expected["eta_min"]) / 1e-4, len(expected["lr_0.0001"]), 7
    found = [peak * factor(i, epochs * steps, "cosine-40", 0.0, floor, epochs) for i in range(epochs * steps)]
    assert (epochs, int(expected["T_max"])) == (400, 40)
    np.testing.assert_allclose(found, expected["lr_0.0001"].repeat(steps), rtol=0, atol=1e-12)


def test_the_schedule_that_falls_and_rises_has_no_warm_up() -> None:
    with pytest.raises(ValueError, match=r"schedule 'cosine-40' has no warm-up, got warmup=0.1; leave it at 0"):
        SoundClassifier(CNN6(), schedule="cosine-40", warmup=0.1)


def test_the_released_moving_average_is_a_smaller_learning_rate(golden: Path) -> None:
    """Averaging the live weights with those before the step, by beta, is Adam at lr (1 - beta).

    In float64: the bias before a batch norm has no gradient, and Adam makes whole steps of its rounding noise, which in
    float32 differs from machine to machine.
    """
    g = np.load(golden / "patchmix" / "schedule_ma.npz")
    norm = nn.BatchNorm1d(4, momentum=0.1 * (1 - float(g["ma_beta"])))  # its running statistics are averaged as well
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)).double()
    initial = {key.removeprefix("ma_init."): torch.from_numpy(g[key]) for key in g if key.startswith("ma_init.")}
    model.load_state_dict(initial)
    lr = float(g["ma_lr"]) * (1 - float(g["ma_beta"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=float(g["ma_weight_decay"]))
    for x, y in zip(torch.from_numpy(g["ma_x"]).double(), torch.from_numpy(g["ma_y"]), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        if key != "1.num_batches_tracked":  # stays 0 for ever there
            loose = key in ("0.bias", "1.running_mean")
            np.testing.assert_allclose(value, g[f"ma_final.{key}"], rtol=0, atol=1e-3 if loose else 1e-5, err_msg=key)


def test_a_short_warm_up_is_an_epoch_at_least() -> None:
    assert factor(0, 8, "epoch-cosine", warmup=0.1, epochs=4) == pytest.approx(0.1)


def fit(root: Path, folder: Path, schedule: Any = "epoch-cosine", **options: Any) -> list[float]:
    """Train, and return the learning rate of each step."""
    found: list[float] = []

    class Watched(SoundClassifier):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            found.append(optimizer.param_groups[0]["lr"])

    data = ICBHIDataModule(root, batch_size=4, duration=0.5, val_fraction=0.0)
    limits = {"max_epochs": 3, "limit_train_batches": 2} | options
    trainer = Trainer(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", **limits)
    trainer.fit(Watched(CNN6(), lr=1.0, schedule=schedule, lr_floor=0.5), datamodule=data)
    return found


def test_the_trainer_follows_it(icbhi_root: Path, tmp_path: Path) -> None:
    assert fit(icbhi_root, tmp_path) == pytest.approx([0.875, 0.875, 0.625, 0.625, 0.5, 0.5])


def test_the_trainer_follows_the_one_that_falls_and_rises(icbhi_root: Path, tmp_path: Path) -> None:
    expected = [0.75 + 0.25 * np.cos(np.pi * epoch / 40) for epoch in (0, 0, 1, 1, 2, 2)]
    assert fit(icbhi_root, tmp_path, "cosine-40") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["epoch-cosine", "cosine-40"])
def test_it_needs_epochs(icbhi_root: Path, tmp_path: Path, schedule: str) -> None:
    with pytest.raises(ValueError, match=f"schedule '{schedule}' counts epochs; give Trainer max_epochs"):
        fit(icbhi_root, tmp_path, schedule, max_steps=4)
