from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

CLASSES = ("normal", "crackle", "wheeze", "both")


class Lookup(nn.Module):
    """Model whose logits are written in the first samples of the waveform."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(num_classes)
        self.num_classes = num_classes

    def forward(self, waveform: Tensor) -> Tensor:
        return self.scale * waveform[:, : self.num_classes]


class Table:
    """Side of a data set: a cycles table with logits to hand out as waveforms."""

    def __init__(self, cycles: pd.DataFrame, logits: Tensor) -> None:
        self.cycles = cycles
        self.logits = logits
        self.rows: Sequence[int] = range(len(cycles))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.rows[number]
        label, index = int(self.cycles["label"].iloc[row]), int(self.cycles.index[row])
        return {"waveform": self.logits[row], "label": torch.tensor(label), "index": torch.tensor(index)}


class TableModule:
    """What evaluate() asks of a data module, and no more; it has no loaders."""

    def __init__(self, side: Table, classes: Sequence[str], scoring: str, protocol: dict[str, Any]) -> None:
        self.side, self.classes, self.scoring, self.seed = side, tuple(classes), scoring, 7
        self.record = protocol
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        self.protocol = self.record
        self.test_set = self.val_set = self.side


@pytest.fixture
def make() -> Callable[..., tuple[Lookup, TableModule]]:
    """Build a model and a data module: *num_cycles* random cycles of *num_patients* patients."""

    def build(
        num_cycles: int = 90,
        num_patients: int = 9,
        classes: Sequence[str] = CLASSES,
        absent: Sequence[int] = (),
        scoring: str = "icbhi",
        **protocol: Any,
    ) -> tuple[Lookup, TableModule]:
        rng = np.random.default_rng(3)
        labels = rng.choice([label for label in range(len(classes)) if label not in absent], num_cycles)
        patient = rng.integers(0, num_patients, num_cycles)
        cycles = pd.DataFrame(
            {
                "recording": [f"{101 + number}_1b1" for number in patient],
                "cycle": np.arange(num_cycles),
                "start": np.arange(num_cycles) * 2.0,
                "end": np.arange(num_cycles) * 2.0 + 1.5,
                "label": labels,
                "patient": [str(101 + number) for number in patient],
                "device": np.array(["Meditron", "AKGC417L", "Litt3200"])[patient % 3],
                "location": rng.choice(["Al", "Ar", "Pl", "Tc"], num_cycles),
                "sex": [None if number == 0 else "MF"[number % 2] for number in patient],
                "age_group": np.where(patient < 3, "child", "adult"),
                "age": 3.0 + 9 * patient,
                "split": rng.choice(["inter", "intra"], num_cycles) if scoring == "sprsound" else "test",
            },
            index=rng.permutation(2 * num_cycles)[:num_cycles],
        )
        logits = rng.standard_normal((num_cycles, len(classes)))
        logits[np.arange(num_cycles), labels] += 1.5
        side = Table(cycles, torch.tensor(logits, dtype=torch.float32))
        record = {"dataset": "Table", "protocol": "official", "labels": "4-class", "select_on": "val"} | protocol
        return Lookup(len(classes)), TableModule(side, classes, scoring, record)

    return build
