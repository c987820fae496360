"""Two processes give the numbers of one, also where the data does not divide between them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, warnings
import torch
from lightning.pytorch import Trainer, seed_everything
from respiro.datamodules import ICBHIDataModule
from respiro.methods import SoundClassifier
from respiro.models import CNN6

torch.set_num_threads(1)
root, devices, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
seed_everything(0, verbose=False)
data = ICBHIDataModule(root, batch_size=4, duration=0.5, val_fraction=0.3)
data.prepare_data()
data.setup("test")
odd = data.test_set.cycles.index[:9]
data.test_set = data.test_set.subset(odd)
data.setup = lambda stage: None
model = SoundClassifier(CNN6())
trainer = Trainer(devices=devices, accelerator="cpu", strategy="ddp" if devices > 1 else "auto", logger=False,
                  enable_progress_bar=False, enable_model_summary=False)
metrics = trainer.test(model, datamodule=data, verbose=False)[0]
if trainer.is_global_zero:
    open(output, "w").write(json.dumps(metrics))
"""


@pytest.fixture(scope="module")
def results(icbhi_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    found = {}
    for devices in (1, 2):
        output = folder / f"{devices}.json"
        command = [sys.executable, str(script), str(icbhi_root), str(devices), str(output)]
        subprocess.run(command, check=True, timeout=300, cwd=folder, capture_output=True)
        found[devices] = json.loads(output.read_text())
    return found


def test_two_processes_test_like_one(results: dict[int, dict[str, float]]) -> None:
    assert set(results[1]) == {"test_loss", "test_score", "test_sensitivity", "test_specificity"}
    assert results[2] == pytest.approx(results[1], abs=1e-6)
