"""The same on a GPU as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from respiro.datamodules import ICBHIDataModule
from respiro.evaluation import evaluate
from respiro.methods import SoundClassifier
from respiro.models import CNN6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_logits_are_those_of_the_cpu() -> None:
    waveform = torch.randn(4, 32000, generator=torch.Generator().manual_seed(0))
    model = SoundClassifier(CNN6()).eval()
    with torch.inference_mode():
        expected = model(waveform)
        found = model.cuda()(waveform.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_test_and_evaluate(icbhi_root: Path, tmp_path: Path, precision: str) -> None:
    seed_everything(0, verbose=False)
    data = ICBHIDataModule(icbhi_root, batch_size=8, duration=1.0, num_workers=2)
    model = SoundClassifier(CNN6())
    trainer = Trainer(max_epochs=1, accelerator="gpu", devices=1, precision=precision, default_root_dir=tmp_path)  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data)
    report = evaluate(model.cuda(), data)
    assert len(report.predictions) == len(data.test_set)
    assert len(model.predict(torch.zeros(2, 16000))) == 2
