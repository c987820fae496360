"""SoundClassifier: training, checkpoints of plain data, prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import ICBHI
from respiro.errors import AudioError, CheckpointError, LabelError
from respiro.losses import CrossEntropy
from respiro.methods import SoundClassifier
from respiro.methods._checkpoint import RECORD, restore
from respiro.models import CNN6, LinearHead, TimmBackbone
from respiro.transforms import KaldiFbank, LogMelSpectrogram

SILENT: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


class ForeignLoss(nn.Module):
    """Somebody's own loss."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)


def fitted(root: Path, folder: Path, epochs: int = 1, **parts: Any) -> tuple[SoundClassifier, ICBHIDataModule, Path]:
    seed_everything(0, verbose=False)
    data = ICBHIDataModule(root, batch_size=8, duration=1.0, val_fraction=0.3)
    model = SoundClassifier(CNN6(), **parts)
    trainer = Trainer(max_epochs=epochs, default_root_dir=folder, limit_train_batches=2, limit_val_batches=2, **SILENT)
    trainer.fit(model, datamodule=data)
    path = folder / "model.ckpt"
    trainer.save_checkpoint(path)
    return model.eval(), data, path


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"features": KaldiFbank(num_mel_bins=64), "head": LinearHead(512, 4, dropout=0.1, layer_norm=True)},
        {
            "loss": CrossEntropy(weight=[1.0, 2.0, 3.0, 4.0], label_smoothing=0.1),
            "optimizer": "sgd",
            "schedule": "constant",
        },
    ],
    ids=["defaults", "other-parts", "other-loss-and-optimiser"],
)
def test_a_restored_model_gives_the_same_logits(icbhi_root: Path, tmp_path: Path, parts: dict[str, Any]) -> None:
    model, _, path = fitted(icbhi_root, tmp_path, **parts)
    waveform = torch.randn(3, 16000, generator=torch.Generator().manual_seed(0))
    again = SoundClassifier.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    torch.testing.assert_close(again(waveform), model(waveform), rtol=0, atol=0)
    assert dict(again.hparams) == dict(model.hparams)
    assert again.protocol == model.protocol
    assert again.protocol["dataset"] == "ICBHI"
    torch.testing.assert_close(restore(path).eval()(waveform), model(waveform), rtol=0, atol=0)


def test_a_foreign_module_trains_and_is_asked_for_by_name(icbhi_root: Path, tmp_path: Path) -> None:
    model, _, path = fitted(icbhi_root, tmp_path, loss=ForeignLoss())
    with pytest.raises(
        CheckpointError, match=r"ForeignLoss', which respiro did not write.*load_from_checkpoint\(path, loss="
    ):
        SoundClassifier.load_from_checkpoint(path, weights_only=True)
    again = SoundClassifier.load_from_checkpoint(path, weights_only=True, loss=ForeignLoss())
    waveform = torch.zeros(1, 16000)
    torch.testing.assert_close(again.eval()(waveform), model(waveform), rtol=0, atol=0)


def test_resuming_continues(icbhi_root: Path, tmp_path: Path) -> None:
    """Two epochs in one go, and one epoch, a checkpoint, and one more, end in the same weights."""
    data = ICBHIDataModule(icbhi_root, batch_size=8, duration=1.0, val_fraction=0.3)
    options = {"max_epochs": 2, "limit_train_batches": 2, "default_root_dir": tmp_path, **SILENT}
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    seed_everything(0, verbose=False)
    whole = SoundClassifier(CNN6())
    Trainer(**options, callbacks=[every]).fit(whole, datamodule=data)
    resumed = SoundClassifier(CNN6())
    trainer = Trainer(**options)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert trainer.global_step == 4
    for (name, expected), value in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"not a checkpoint", "cannot be read as a checkpoint"),
        ({"state_dict": {}}, "was not written by a respiro method"),
        ({"state_dict": {}, "hyper_parameters": {"lr": 1.0}}, "was not written by a respiro method"),
        ({"hyper_parameters": {}, RECORD: {"path": Path("x")}}, "cannot be read as a checkpoint of plain data"),
    ],
    ids=["missing", "garbage", "weights-only", "other-lightning-module", "pickled-objects"],
)
def test_what_is_not_our_checkpoint_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "model.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        SoundClassifier.load_from_checkpoint(path)


def test_labels_that_do_not_fit_are_refused(sprsound_root: Path, tmp_path: Path) -> None:
    data = SPRSoundDataModule(sprsound_root, task="1-1", partial=True, duration=1.0)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT)
    with pytest.raises(LabelError, match=r"\['normal', 'adventitious'\] and scoring 'sprsound', the model"):
        trainer.fit(SoundClassifier(CNN6()), datamodule=data)
    with pytest.raises(LabelError, match=r"scoring=datamodule\.scoring"):
        trainer.fit(SoundClassifier(CNN6(), classes=data.classes), datamodule=data)


def test_sampling_rates_that_do_not_fit_are_refused(icbhi_root: Path, tmp_path: Path) -> None:
    data = ICBHIDataModule(icbhi_root, sample_rate=8000, duration=1.0)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT)
    with pytest.raises(ValueError, match="8000 Hz, the features expect 16000 Hz"):
        trainer.fit(SoundClassifier(CNN6()), datamodule=data)


def test_a_stamp_once_earned_stays(icbhi_root: Path, tmp_path: Path) -> None:
    """Training on honestly after a test-selected start does not hide the start."""
    options = {"limit_train_batches": 1, "limit_val_batches": 1, "default_root_dir": tmp_path, **SILENT}
    settings: dict[str, Any] = {"batch_size": 4, "duration": 1.0}
    seed_everything(7, verbose=False)
    model = SoundClassifier(CNN6())
    first = Trainer(max_epochs=1, **options)
    first.fit(model, datamodule=ICBHIDataModule(icbhi_root, select_on="test", **settings))
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = SoundClassifier(CNN6())
    honest = ICBHIDataModule(icbhi_root, **settings)
    Trainer(max_epochs=2, **options).fit(resumed, datamodule=honest, ckpt_path=tmp_path / "first.ckpt")
    Trainer(max_epochs=1, **options).fit(model, datamodule=honest)
    for trained in (model, resumed):
        assert [record["select_on"] for record in trained.history] == ["test", "val"]
        assert trained.protocol["select_on"] == "val"
        assert trained.protocol["training_seed"] == 7
    Trainer(max_epochs=1, **options).fit(model, datamodule=honest)
    assert len(model.history) == 2  # the same record again says nothing new


@pytest.mark.parametrize(("schedule", "fits"), [("cosine", False), ("constant", True)])
def test_training_for_a_time(icbhi_root: Path, tmp_path: Path, schedule: Any, fits: bool) -> None:
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=0.5)
    trainer = Trainer(max_epochs=-1, max_time={"seconds": 2}, limit_val_batches=0, default_root_dir=tmp_path, **SILENT)
    model = SoundClassifier(CNN6(), schedule=schedule)
    if fits:
        trainer.fit(model, datamodule=data)
    else:
        with pytest.raises(ValueError, match="max_epochs or max_steps"):
            trainer.fit(model, datamodule=data)


class NoSize(nn.Module):
    """A backbone that does not say how large its embeddings are."""


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SoundClassifier(NoSize()), TypeError, "NoSize has no num_features.*head="),  # type: ignore[arg-type]
        (lambda: SoundClassifier(CNN6(), head=LinearHead(512, 3)), LabelError, "3 logits for 4 classes"),
        (lambda: SoundClassifier(CNN6(), classes=["a", "a"]), LabelError, "two different names"),
        (lambda: SoundClassifier("CNN6"), TypeError, "backbone must be a Backbone"),  # type: ignore[arg-type]
    ],
    ids=["no-size", "head-of-three", "same-names", "a-name"],
)
def test_parts_that_do_not_fit_are_refused(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_numpy_numbers_can_be_restored(icbhi_root: Path, tmp_path: Path) -> None:
    _, _, path = fitted(icbhi_root, tmp_path, lr=np.float64(1e-3), head=LinearHead(512, 4, dropout=np.float32(0.5)))
    assert SoundClassifier.load_from_checkpoint(path, weights_only=True).lr == 1e-3


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -1.0),
        ("warmup", 1.0),
    ],
)
def test_wrong_values_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        SoundClassifier(CNN6(), **{argument: value})


def test_balanced_weights_come_from_the_train_counts(icbhi_root: Path, tmp_path: Path) -> None:
    model, data, path = fitted(icbhi_root, tmp_path)
    counts = torch.tensor(data.class_counts, dtype=torch.float32)
    torch.testing.assert_close(model.loss.class_weight, counts.sum() / (4 * counts))  # type: ignore[arg-type]
    again = SoundClassifier.load_from_checkpoint(path, weights_only=True)
    torch.testing.assert_close(again.loss.class_weight, model.loss.class_weight)  # type: ignore[arg-type]


def test_it_overfits_eight_cycles() -> None:
    seed_everything(0, verbose=False)
    time = torch.arange(8000) / 16000
    waveform = torch.stack([torch.sin(2 * torch.pi * (200 + 150 * k) * time) for k in range(4) for _ in range(2)])
    batch = {"waveform": waveform + 0.05 * torch.randn(8, 8000), "label": torch.arange(4).repeat_interleave(2)}
    model = SoundClassifier(CNN6(), features=LogMelSpectrogram(hop_length=256), loss=CrossEntropy())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(25):
        loss = model.loss(model(batch["waveform"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert model(batch["waveform"]).argmax(1).tolist() == batch["label"].tolist()


def test_any_timm_encoder_fits_in(icbhi_root: Path) -> None:
    model = SoundClassifier(TimmBackbone("resnet10t"), features=KaldiFbank()).eval()
    assert model(torch.randn(2, 16000)).shape == (2, 4)


class TestPredict:
    model = SoundClassifier(CNN6())

    def check(self, table: Any, rows: int) -> None:
        assert len(table) == rows
        columns = [f"p_{name}" for name in self.model.classes]
        np.testing.assert_allclose(table[columns].sum(axis=1), 1.0, atol=1e-5)
        best = table[columns].to_numpy().argmax(axis=1)
        assert table["prediction"].tolist() == [self.model.classes[label] for label in best]

    @pytest.mark.parametrize(
        ("x", "rows"),
        [(torch.zeros(16000), 1), (torch.zeros(3, 16000), 3), ({"waveform": torch.zeros(2, 16000)}, 2)],
        ids=["one", "batch", "batch-dict"],
    )
    def test_waveforms(self, x: Any, rows: int) -> None:
        self.check(self.model.predict(x), rows)

    def test_a_data_set(self, icbhi_root: Path) -> None:
        data = ICBHI(icbhi_root, split="test", duration=1.0)
        data = data.subset(data.cycles.index[[5, 2, 9]])
        table = self.model.predict(data)
        self.check(table, 3)
        assert table.index.tolist() == data.cycles.index.tolist()
        assert table["patient"].tolist() == data.cycles["patient"].tolist()

    def test_a_file_without_cycle_times(self, tmp_path: Path) -> None:
        path = tmp_path / "long.wav"
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 4000 * 19), 4000)
        table = self.model.predict(path)
        self.check(table, 3)
        assert table[["start", "end"]].to_numpy().tolist() == [[0, 8], [8, 16], [11, 19]]

    def test_a_file_with_cycle_times_reads_like_the_data_set(self, icbhi_root: Path) -> None:
        data = ICBHI(icbhi_root, split="test", fade="recording")
        name = data.cycles["recording"].iloc[0]
        cycles = data.cycles[data.cycles["recording"] == name]
        path = data.recordings.set_index("recording").loc[name, "path"]
        table = self.model.predict(path, list(zip(cycles["start"], cycles["end"], strict=True)))
        expected = self.model.predict(data.subset(cycles.index))
        columns = [f"p_{name}" for name in self.model.classes]
        np.testing.assert_allclose(table[columns], expected[columns], atol=1e-5)

    @pytest.mark.parametrize(
        ("cycles", "message"),
        [
            ([], "empty"),
            ([(1.0, 0.5)], "does not lie within"),
            ([(0.0, 0.5), (0.0, 9.0)], "cycle 1"),
            ([(-1.0, 1.0)], "cycle 0"),
            ([(0.5, 0.50001)], "no samples"),
        ],
    )
    def test_wrong_cycle_times(self, tmp_path: Path, cycles: Any, message: str) -> None:
        path = tmp_path / "short.wav"
        soundfile.write(path, np.zeros(4000), 4000)
        with pytest.raises(ValueError, match=message):
            self.model.predict(path, cycles)

    @pytest.mark.parametrize("samples", [800, 32000, 32001, 80001])
    def test_no_window_is_a_sliver(self, tmp_path: Path, samples: int) -> None:
        path = tmp_path / "any.wav"
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, samples), 4000)
        table = self.model.predict(path)
        assert table["end"].iloc[-1] == samples / 4000
        assert ((table["end"] - table["start"]).round(9) == min(8.0, samples / 4000)).all()

    def test_what_is_no_sound(self, tmp_path: Path) -> None:
        with pytest.raises(AudioError):
            self.model.predict(tmp_path / "absent.wav")
        with pytest.raises(ValueError, match="predict takes waveforms"):
            self.model.predict(3)

    def test_the_modes_are_left_as_they_were(self) -> None:
        self.model.train()
        self.model.backbone.eval()
        self.model.predict(torch.zeros(16000))
        assert self.model.training
        assert not self.model.backbone.training
