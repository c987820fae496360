"""Batches of equal classes: counts, order, epochs, processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datamodules._sampling import BalancedSampler
from respiro.methods._steps import check_batches

#: Cycles of each class.
TWO = [300, 100]
SEVEN = [500, 120, 60, 30, 20, 10, 1]
FORTY = [(3 * k) % 17 + 1 for k in range(40)]


def labels_of(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def epoch(sampler: BalancedSampler, size: int) -> list[list[int]]:
    """The batches of one pass."""
    rows = list(sampler)
    assert len(rows) == len(sampler)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("counts", "size", "per_class", "slots_of_a_class"),
    [
        (TWO, 32, 8, {2}),
        (TWO, 32, 16, {1}),
        (TWO, 24, 8, {1, 2}),
        (SEVEN, 56, 8, {1}),
        (SEVEN, 32, 8, {0, 1}),
        (SEVEN, 64, 4, {2, 3}),
        (FORTY, 32, 4, {0, 1}),
        (FORTY, 48, 1, {1, 2}),
        ([5], 8, 4, {2}),
    ],
    ids=[
        *("2-classes", "2-classes-2-slots", "2-classes-3-slots", "7-classes", "7-classes-4-slots"),
        *("7-classes-16-slots", "40-classes", "40-classes-48-slots", "1-class"),
    ],
)
def test_the_slots_of_every_batch_are_dealt_evenly(
    counts: list[int], size: int, per_class: int, slots_of_a_class: set[int]
) -> None:
    labels = labels_of(counts)
    batches = epoch(BalancedSampler(labels, size, per_class), size)
    assert len(batches) == -(-len(labels) // size)
    turns = np.zeros(len(counts), dtype=int)
    for batch in batches:
        cycles = np.bincount(labels[batch], minlength=len(counts))
        assert cycles.sum() == size
        assert set(cycles % per_class) == {0}
        assert set(cycles // per_class) <= slots_of_a_class
        turns += cycles // per_class
        assert turns.max() - turns.min() <= 1  # also over batches, nobody is dealt twice before everybody was once


@pytest.mark.parametrize(("counts", "size", "per_class"), [(TWO, 32, 8), (SEVEN, 56, 8), (FORTY, 32, 4)])
def test_a_batch_holds_a_cycle_twice_only_where_its_class_is_too_small(
    counts: list[int], size: int, per_class: int
) -> None:
    labels = labels_of(counts)
    sampler = BalancedSampler(labels, size, per_class)
    for _ in range(20):
        for batch in epoch(sampler, size):
            for label, drawn in Counter(labels[batch].tolist()).items():
                times = Counter(row for row in batch if labels[row] == label)
                assert len(times) == min(drawn, counts[label])
                assert max(times.values()) == -(-drawn // counts[label])


def test_a_rare_class_of_one_cycle_fills_its_slots() -> None:
    labels = labels_of(SEVEN)
    (only,) = np.flatnonzero(labels == 6)
    for batch in epoch(BalancedSampler(labels, 56, 8), 56):
        assert batch.count(only) == 8


def test_every_cycle_comes_once_before_one_comes_again() -> None:
    """Within an epoch a class is gone through in whole rounds, the last of them unfinished."""
    labels = labels_of(SEVEN)
    rows = list(BalancedSampler(labels, 56, 8))
    for label in range(7):
        times = np.bincount(rows, minlength=len(labels))[labels == label]
        assert times.max() - times.min() <= 1


def test_every_cycle_of_a_frequent_class_comes_in_time() -> None:
    labels = labels_of(SEVEN)
    sampler = BalancedSampler(labels, 56, 8)
    seen = {row for _ in range(60) for row in sampler}  # 14 batches hold 112 of 500 cycles: missed 60 times, p = 3e-7
    assert seen == set(range(len(labels)))


def test_cycles_without_a_label_are_left_out() -> None:
    labels = np.array([0, -1, 1, -1, -1, 1, 0, -1])
    rows = list(BalancedSampler(labels, 2, 1))
    assert len(rows) == 4
    assert set(rows) <= {0, 2, 5, 6}
    assert list(BalancedSampler([-1, -1], 2, 1)) == []


# --------------------------------------------------------------------------------------------------- order and epochs


def test_the_order_is_that_of_seed_and_epoch() -> None:
    labels = labels_of(SEVEN)

    def order(seed: int, number: int) -> list[int]:
        sampler = BalancedSampler(labels, 32, 8, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert order(3, 5) == order(3, 5)
    different = [tuple(order(seed, number)) for seed in range(3) for number in range(3)]
    assert len(set(different)) == 9


def test_every_pass_is_an_epoch_of_its_own() -> None:
    labels = labels_of(SEVEN)
    sampler, told = BalancedSampler(labels, 32, 8), BalancedSampler(labels, 32, 8)
    for number in range(3):
        told.set_epoch(number)
        assert list(sampler) == list(told)
    told.set_epoch(1)
    sampler.set_epoch(1)
    assert list(sampler) == list(told)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_take_turns_with_the_batches(world: int) -> None:
    labels = labels_of([600, 500])
    shares = [epoch(BalancedSampler(labels, 20, 5, num_replicas=world, rank=rank), 20) for rank in range(world)]
    assert [len(share) for share in shares] == [-(-1100 // (20 * world))] * world
    rows = [row for share in shares for batch in share for row in batch if labels[row] == 0]
    assert 500 < len(rows) == len(set(rows))  # no process draws what another has drawn
    for share in shares:
        assert all(Counter(labels[batch].tolist()) == {0: 10, 1: 10} for batch in share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 32, "samples_per_class": 0}, "samples_per_class must be a whole number of at least 1, got 0"),
        ({"batch_size": 32, "samples_per_class": 2.0}, r"samples_per_class must be a whole number .* got 2\.0"),
        (
            {"batch_size": 32, "samples_per_class": 5},
            "batch_size must be a multiple of samples_per_class, got 32 and 5",
        ),
        ({"batch_size": 4, "samples_per_class": 8}, "batch_size must be a multiple of samples_per_class, got 4 and 8"),
    ],
    ids=["none", "no-number-of-cycles", "no-multiple", "larger"],
)
def test_wrong_values_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedSampler([0, 1], **options)
    for build in (ICBHIDataModule, SPRSoundDataModule):
        with pytest.raises(ValueError, match=message):
            build("anywhere", **options)


# --------------------------------------------------------------------------------------------------------- datamodules


def ready(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_train_loader_of_sprsound_task_1_1(sprsound_root: Path) -> None:
    data = ready(
        SPRSoundDataModule(
            sprsound_root, batch_size=6, samples_per_class=3, duration=0.5, sample_rate=8000, partial=True
        )
    )
    loader = data.train_dataloader()
    assert len(loader) == -(-len(data.train_set) // 6)
    first, second = ([(batch["label"].tolist(), batch["index"].tolist()) for batch in loader] for _ in range(2))
    for labels, rows in first:
        assert sorted(Counter(labels).values()) in ([3, 3], [6])
        assert data.train_set.cycles.loc[rows, "label"].tolist() == labels
    assert first != second  # without a trainer, too, every pass is another draw
    assert data.protocol["samples_per_class"] == 3
    assert data.hparams["samples_per_class"] == 3


def test_other_sides_and_other_datamodules_are_as_before(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, batch_size=8, samples_per_class=2, val_fraction=0.3, duration=0.5))
    rows = [row for batch in data.val_dataloader() for row in batch["index"].tolist()]
    assert rows == data.val_set.cycles.index.tolist()
    plain = ready(ICBHIDataModule(icbhi_root, duration=0.5))
    assert plain.protocol["samples_per_class"] is None
    rows = [row for batch in plain.train_dataloader() for row in batch["index"].tolist()]
    assert sorted(rows) == sorted(plain.train_set.cycles.index)


class Watching(LightningModule):
    """Notes which cycles come in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch["index"].tolist())
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, epochs: int, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=bool(callbacks), limit_val_batches=0,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("samples_per_class", [None, 2], ids=["shuffled", "balanced"])
def test_a_resumed_training_goes_on_in_the_order_of_an_uninterrupted_one(
    icbhi_root: Path, tmp_path: Path, samples_per_class: int | None, workers: int
) -> None:
    """Also with loader processes, which draw the first batches before Lightning tells the epoch."""
    options: dict[str, Any] = {"batch_size": 8, "duration": 0.5, "val_fraction": 0.3, "num_workers": workers}

    def data() -> ICBHIDataModule:
        return ICBHIDataModule(icbhi_root, samples_per_class=samples_per_class, **options)

    seed_everything(7, verbose=False)
    whole, again, resumed = Watching(), Watching(), Watching()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, 3, every).fit(whole, datamodule=data())
    trainer(tmp_path, 1).fit(again, datamodule=data())
    trainer(tmp_path, 3).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert list(whole.seen) == [0, 1, 2]
    assert resumed.seen == {number: whole.seen[number] for number in (1, 2)}
    assert again.seen == {0: whole.seen[0]}
    assert len({json.dumps(batches) for batches in whole.seen.values()}) == 3


def test_a_trainer_gets_the_batches_of_the_sampler_and_they_are_known_to_be_full(
    icbhi_root: Path, tmp_path: Path
) -> None:
    class Checking(Watching):
        def on_train_start(self) -> None:
            check_batches(self.trainer, 8)  # without drop_last

    seed_everything(7, verbose=False)
    data = ready(ICBHIDataModule(icbhi_root, batch_size=8, samples_per_class=2, duration=0.5))
    rows = data.train_set.cycles.index
    assert len(rows) % 8
    model = Checking()
    trainer(tmp_path, 1).fit(model, datamodule=data)
    sampler = BalancedSampler(data.train_set.cycles["label"].to_numpy(), 8, 2, seed=7)
    assert [[rows.get_loc(row) for row in batch] for batch in model.seen[0]] == epoch(sampler, 8)


TRAINING = """
import json, sys
import torch
from lightning.pytorch import LightningModule, Trainer
from respiro.datamodules import ICBHIDataModule

class Watching(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append([batch["index"].tolist(), batch["label"].tolist()])
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.set_num_threads(1)
root, output = sys.argv[1:]
data = ICBHIDataModule(root, batch_size=8, samples_per_class=4, labels="2-class", duration=0.5, val_fraction=0.0)
model = Watching()
trainer = Trainer(max_epochs=2, devices=2, accelerator="cpu", strategy="ddp", logger=False, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False)
trainer.fit(model, datamodule=data)
sampler = type(trainer.train_dataloader.sampler).__name__
cycles = len(data.train_set)
open(f"{output}/{trainer.global_rank}.json", "w").write(json.dumps([model.seen, sampler, cycles, data.class_counts]))
"""


def test_two_processes_train_on_batches_of_their_own(icbhi_root: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TRAINING)
    command = [sys.executable, str(script), str(icbhi_root), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, capture_output=True)
    (first, sampler, cycles, counts), (second, *_) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert sampler == "BalancedSampler"  # Lightning has not put its own in its place
    batches = -(-cycles // 16)
    assert len(first) == len(second) == 2 * batches
    for rows, labels in first + second:
        assert len(rows) == 8
        assert Counter(labels) == {0: 4, 1: 4}
    frequent = int(np.argmax(counts))
    for start in (0, batches):  # each epoch
        drawn = [
            row
            for share in (first, second)
            for rows, labels in share[start : start + batches]
            for row, label in zip(rows, labels, strict=True)
            if label == frequent
        ]
        assert len(drawn) == 8 * batches
        assert len(set(drawn)) == min(len(drawn), counts[frequent])
