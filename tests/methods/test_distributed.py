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


TRAINING = """
import json, sys
import torch
from lightning.pytorch import Trainer, seed_everything
from respiro.datamodules import ICBHIDataModule
from respiro.losses import PatchMixContrastiveLoss
from respiro.methods import PatchMixCL
from respiro.models import AST
from respiro.transforms import KaldiFbank, PatchMix, SpecAugment

torch.set_num_threads(1)
root, output = sys.argv[1:]
seed_everything(0, verbose=False)
draws = []

class Watched(PatchMix):
    def draw(self, *args):
        index, mask = super().draw(*args)
        draws.append([index.tolist(), mask.tolist()])
        return index, mask

class WatchedMasks(SpecAugment):
    def forward(self, features, generator=None):
        augmented = super().forward(features, generator)
        draws.append((augmented != features).tolist())
        return augmented

model = PatchMixCL(
    AST("tiny224", num_mel_bins=32, frames=48, stride=8),
    features=KaldiFbank(num_mel_bins=32),
    augment=WatchedMasks(freq_width=8, time_width=20),
    patch_mix=Watched(),
    contrastive=PatchMixContrastiveLoss(gather=True),
    target="project_flow",
)
data = ICBHIDataModule(root, batch_size=3, duration=0.5, drop_last=True)
trainer = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, devices=2, accelerator="cpu",
                  strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
                  enable_checkpointing=False)
trainer.fit(model, datamodule=data)
weights = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
open(f"{output}/{trainer.global_rank}.json", "w").write(json.dumps({"draws": draws, "weights": weights}))
"""


def test_two_processes_draw_differently_and_stay_together(icbhi_root: Path, tmp_path: Path) -> None:
    """Masks, partners and shares are each process's own; after the steps both hold the same weights."""
    script = tmp_path / "script.py"
    script.write_text(TRAINING)
    command = [sys.executable, str(script), str(icbhi_root), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, capture_output=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["draws"]) == len(second["draws"]) == 4
    drawn = [json.dumps(draw) for draw in first["draws"] + second["draws"]]
    assert len(set(drawn)) == len(drawn)  # neither another step nor another process draws the same
    assert first["weights"] == second["weights"]


PROBING = """
import json, sys
import torch
from lightning.pytorch import Trainer, seed_everything
from respiro.datamodules import ICBHIDataModule
from respiro.losses import MultiSupConLoss
from respiro.methods import MSCL, LinearProbe
from respiro.models import CNN6
from respiro.transforms import LogMelSpectrogram, SpecAugment

torch.set_num_threads(1)
root, devices, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
features = LogMelSpectrogram(hop_length=500, n_mels=16)
settings = dict(devices=devices, accelerator="cpu", strategy="ddp" if devices > 1 else "auto", logger=False,
                enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
found = {}

def data():
    return ICBHIDataModule(root, batch_size=4, duration=0.5, val_fraction=0.3, drop_last=True)

for probe in ("logistic", "adam", "knn"):
    seed_everything(0, verbose=False)
    model = LinearProbe(CNN6(), features=features, probe=probe)
    trainer = Trainer(**settings)
    trainer.fit(model, datamodule=data())
    state = model.head.state_dict()
    found[probe] = [tensor.double().abs().sum().item() for tensor in state.values()]
    found[probe + " score"] = trainer.callback_metrics["val_score"].item()

seed_everything(0, verbose=False)
model = MSCL(CNN6(), features=features, augment=SpecAugment("icbhi_sup", freq_width=4, time_width=4),
             loss=MultiSupConLoss(gather=True, memory=16))
trainer = Trainer(max_epochs=1, limit_train_batches=2, **settings)
trainer.fit(model, datamodule=data())
memory = model.loss.losses["class"].get_extra_state()["embeddings"]

# Batch norm has met other batches on each process; the head is to be fitted to the one encoder that is kept.
train_set = trainer.datamodule.train_set
knn = LinearProbe(model.backbone, features=features, probe="knn")
trainer = Trainer(**settings)
trainer.fit(knn, datamodule=data())
own = torch.nn.functional.normalize(knn.embed(train_set), dim=1)
found["apart"] = (own - torch.nn.functional.normalize(knn.head.embeddings, dim=1)).abs().max().item()
found["trained"] = [float(sum(p.detach().double().abs().sum() for p in model.parameters())), memory.sum().item()]
open(f"{output}/{devices}_{trainer.global_rank}.json", "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def probing(icbhi_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("probing")
    script = folder / "script.py"
    script.write_text(PROBING)
    for devices in ("1", "2"):
        command = [sys.executable, str(script), str(icbhi_root), devices, str(folder)]
        subprocess.run(command, check=True, timeout=600, cwd=folder, capture_output=True)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("probe", ["logistic", "adam", "knn"])
def test_two_processes_fit_the_head_of_one(probing: dict[str, dict[str, object]], probe: str) -> None:
    """Each embeds its share of the train side, which does not divide between them."""
    assert probing["2_0"][probe] == probing["2_1"][probe]
    assert probing["2_0"][probe] == pytest.approx(probing["1_0"][probe], rel=1e-2)
    assert probing["2_0"][f"{probe} score"] == pytest.approx(probing["1_0"][f"{probe} score"], abs=0.05)


def test_two_processes_contrast_with_each_other_and_stay_together(probing: dict[str, dict[str, object]]) -> None:
    """After the steps both hold the same weights, fitted head included, and the same memory."""
    assert probing["2_0"]["trained"] == probing["2_1"]["trained"]


def test_two_processes_embed_with_one_encoder(probing: dict[str, dict[str, object]]) -> None:
    assert probing["2_0"]["apart"] == pytest.approx(0.0, abs=1e-4)


OBJECTIVES = """
import json, sys
import torch
from lightning.pytorch import Trainer, seed_everything
from respiro.datamodules import SPRSoundDataModule
from respiro.losses import CenterLoss, MixedCrossEntropy, MultiObjectiveLoss, TripletLoss
from respiro.methods import InceptionFusion
from respiro.models import InceptionResidual, SpectrogramFusion
from respiro.transforms import GammatoneSpectrogram, Mixup, MorletScalogram, StackedFeatures

torch.set_num_threads(1)
root, output = sys.argv[1:]
seed_everything(0, verbose=False)
features = StackedFeatures([GammatoneSpectrogram(num_bands=8), MorletScalogram(num_scales=8, f_min=200)])
branches = [InceptionResidual((8, 8), 8, 2, (0.0, 0.0)) for _ in range(2)]
backbone = SpectrogramFusion(branches, features.bins, num_features=8)
data = SPRSoundDataModule(root, partial=True, sample_rate=8000, duration=0.5, batch_size=4, samples_per_class=2,
                          feature_cache=True, cache_dir=f"{output}/cache")
loss = MultiObjectiveLoss(MixedCrossEntropy("balanced"), CenterLoss(2, 8), TripletLoss(), weighting="uncertainty")
model = InceptionFusion(backbone, data.classes, features, scoring="sprsound", loss=loss, mix=Mixup(p=0.5))
seen = []
step = model.training_step
model.training_step = lambda batch, batch_idx: (seen.extend(batch["index"].tolist()), step(batch, batch_idx))[1]
trainer = Trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=1, devices=2, accelerator="cpu",
                  strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
                  enable_checkpointing=False)
trainer.fit(model, datamodule=data)
found = {"seen": seen, "centers": model.center.centers.tolist(),
         "weights": float(sum(p.detach().double().abs().sum() for p in model.parameters()))}
open(f"{output}/{trainer.global_rank}.json", "w").write(json.dumps(found))
"""


def test_two_processes_share_centres_and_a_cache(sprsound_root: Path, tmp_path: Path) -> None:
    """Every process has batches of its own; the centres move alike, and one fills the cache for both."""
    script = tmp_path / "script.py"
    script.write_text(OBJECTIVES)
    command = [sys.executable, str(script), str(sprsound_root), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, capture_output=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["seen"]) == len(second["seen"]) == 2 * 3 * 4
    assert not set(first["seen"][:12]) & set(second["seen"][:12])  # in one epoch
    assert first["centers"] == second["centers"]
    assert any(value for center in first["centers"] for value in center)
    assert first["weights"] == second["weights"]
    assert len(list((tmp_path / "cache" / "features").glob("*/meta.json"))) == 1


QUALITY = """
import json, sys
import torch
from lightning.pytorch import Trainer, seed_everything
from respiro.datamodules import ICBHIDataModule
from respiro.methods import QLung
from respiro.models import CNN6
from respiro.transforms import LogMelSpectrogram

torch.set_num_threads(1)
root, output = sys.argv[1:]
seed_everything(0, verbose=False)
data = ICBHIDataModule(root, sample_rate=4000, duration=1.0, batch_size=4, cache_dir=f"{output}/cache")
model = QLung(CNN6(), features=LogMelSpectrogram(4000, 256, 128, 16, 50, 2000), lr=1e-3)
seen = {}
step = model.training_step
model.training_step = lambda batch, batch_idx: (
    seen.update(zip(batch["index"].tolist(), batch["quality"].tolist())), step(batch, batch_idx))[1]
trainer = Trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0, devices=2, accelerator="cpu",
                  strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
                  enable_checkpointing=False)
trainer.fit(model, datamodule=data)
found = {"counts": model.margin.get_extra_state(), "expected": data.class_counts,
         "range": model.quality.rms_range.tolist(), "seen": seen,
         "table": data.data.cycles["quality"].to_dict(),
         "weights": float(sum(p.detach().double().abs().sum() for p in model.parameters()))}
open(f"{output}/{trainer.global_rank}.json", "w").write(json.dumps(found))
"""


def test_two_processes_share_class_counts_and_quality(icbhi_root: Path, tmp_path: Path) -> None:
    """Counts and percentiles are those of the whole train side, whatever share of it a process sees."""
    script = tmp_path / "script.py"
    script.write_text(QUALITY)
    command = [sys.executable, str(script), str(icbhi_root), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, capture_output=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["counts"] == second["counts"] == first["expected"]
    assert first["range"] == second["range"]
    assert first["table"] == second["table"]
    assert not set(first["seen"]) & set(second["seen"])
    for row, quality in (first["seen"] | second["seen"]).items():
        assert quality == pytest.approx(first["table"][row])
    assert first["weights"] == second["weights"]
