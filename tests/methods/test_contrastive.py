"""SimCLR, SCL, M-SCL, Hybrid: two views, one extraction, both stages in one training."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from respiro.component import Transform
from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import ICBHI
from respiro.errors import LabelError
from respiro.losses import (
    CrossEntropy,
    HybridSupConLoss,
    MultiSupConLoss,
    NTXentLoss,
    SupConLoss,
    sup_con_loss,
)
from respiro.methods import MSCL, SCL, HybridSCL, SimCLR
from respiro.methods._probe import Embedded, fit_head
from respiro.models import CNN6, Projector
from respiro.transforms import LogMelSpectrogram, SpecAugment, WaveformAugment

SILENT: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}
METHODS = {"simclr": SimCLR, "scl": SCL, "mscl": MSCL, "hybrid": HybridSCL}


def small(cls: type[Any], **arguments: Any) -> Any:
    """A method on pictures of 17 frames of 16 bins, the least that CNN6 takes."""
    parts: dict[str, Any] = {
        "features": LogMelSpectrogram(hop_length=1000, n_mels=16),
        "augment": SpecAugment("icbhi_sup", freq_width=4, time_width=4),
    }
    return cls(CNN6(), **(parts | arguments))


def batch_of(size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "waveform": torch.randn(size, 16000, generator=generator),
        "label": torch.arange(size) % 3,
        "sex_age": torch.arange(size) // 2 - 1,  # the first two unknown
    }


def step(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a training step outside of a trainer, where nothing can be logged."""
    model.log = model.log_dict = lambda *args, **kwargs: None
    torch.manual_seed(0)
    loss: Tensor = model.training_step(batch, 0)
    return loss


class Counting(LogMelSpectrogram):
    """A front end that counts the clips it was given."""

    clips = 0

    def forward(self, waveform: Tensor) -> Tensor:
        self.clips += len(waveform)
        return super().forward(waveform)


class TestViews:
    @pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
    def test_two_views_are_two_augmentations_of_one_extraction(self, cls: type[Any]) -> None:
        model = small(cls, features=Counting(hop_length=1000, n_mels=16))
        one, other = model.views(batch_of())
        assert model.features.clips == 6
        assert one.shape == other.shape == (6, 17, 16)
        assert not torch.equal(one, other)
        clean = model.features(batch_of()["waveform"])
        assert ((one == clean) | (one == clean.mean((1, 2), keepdim=True))).float().mean() > 0.5

    def test_waveforms_that_are_augmented_are_extracted_view_by_view(self) -> None:
        model = small(SCL, features=Counting(hop_length=1000, n_mels=16), waveform_augment=WaveformAugment())
        one, other = model.views(batch_of())
        assert model.features.clips == 12
        assert not torch.equal(one, other)

    @pytest.mark.parametrize(("view_forward", "passes"), [("separate", 2), ("concat", 1)])
    def test_batch_norm_sees_each_view_or_both(self, view_forward: str, passes: int) -> None:
        model = small(SCL, view_forward=view_forward).train()
        model.encode(batch_of())
        assert model.backbone.conv_block1.bn1.num_batches_tracked == passes

    @pytest.mark.parametrize("view_forward", ["separate", "concat"])
    def test_both_ways_give_the_same_where_no_statistics_are_taken(self, view_forward: str) -> None:
        model = small(SCL, augment=SpecAugment("icbhi_sup", p=0.0), view_forward=view_forward).eval()
        batch = batch_of()
        clean = model.backbone(model.features(batch["waveform"]))
        torch.testing.assert_close(model.encode(batch), clean.repeat(2, 1), rtol=1e-4, atol=1e-4)

    def test_the_default_masks_are_the_papers_filled_with_the_minimum(self) -> None:
        augment = SCL(CNN6()).augment
        assert (augment.freq_masks, augment.freq_width, augment.time_masks, augment.time_width) == (2, 20, 2, 40)
        silent_and_loud = torch.cat([torch.zeros(1, 64000), torch.randn(1, 64000)], dim=1)
        assert LogMelSpectrogram()(silent_and_loud).min() == pytest.approx(augment.fill, abs=1e-4)

    def test_other_features_are_filled_with_their_mean(self) -> None:
        assert SCL(CNN6(), features=LogMelSpectrogram(normalize="none")).augment.fill == "mean"


class TestLosses:
    """The loss of a step is that of the equations, on what the step's own parts give."""

    @staticmethod
    def embeddings(model: Any, batch: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        return torch.cat([model.backbone(view) for view in model.views(batch)])

    def test_scl(self) -> None:
        model, batch = small(SCL), batch_of()
        twin = copy.deepcopy(model)
        expected = sup_con_loss(twin.projector(self.embeddings(twin, batch)), batch["label"].repeat(2), 0.06)
        torch.testing.assert_close(step(model, batch), expected)

    def test_scl_on_metadata_ignores_what_is_unknown(self) -> None:
        model, batch = small(SCL, label_key="sex_age"), batch_of()
        twin = copy.deepcopy(model)
        known = batch["sex_age"].repeat(2) >= 0
        projections = twin.projector(self.embeddings(twin, batch))
        torch.testing.assert_close(
            step(model, batch), sup_con_loss(projections[known], batch["sex_age"].repeat(2)[known])
        )

    def test_simclr_is_scl_with_a_label_for_each_sample(self) -> None:
        model, batch = small(SimCLR), batch_of()
        twin = copy.deepcopy(model)
        expected = sup_con_loss(twin.projector(self.embeddings(twin, batch)), torch.arange(6).repeat(2))
        torch.testing.assert_close(step(model, batch), expected)

    def test_mscl_weighs_its_tasks(self) -> None:
        model, batch = small(MSCL, loss=MultiSupConLoss({"class": 0.6, "sex_age": 0.4})), batch_of()
        twin = copy.deepcopy(model)
        embeddings = self.embeddings(twin, batch)
        of_class = sup_con_loss(twin.projectors["class"](embeddings), batch["label"].repeat(2))
        of_sex_age = sup_con_loss(twin.projectors["sex_age"](embeddings), batch["sex_age"].repeat(2))
        torch.testing.assert_close(step(model, batch), 0.6 * of_class + 0.4 * of_sex_age)

    def test_mscl_of_one_task_is_scl(self) -> None:
        scl, batch = small(SCL), batch_of()
        mscl = small(MSCL, loss=MultiSupConLoss({"class": 1.0}), projectors={"class": scl.projector})
        mscl.backbone = copy.deepcopy(scl.backbone)
        torch.testing.assert_close(step(mscl, batch), step(scl, batch))

    def test_hybrid(self) -> None:
        loss = HybridSupConLoss(ce_weight=0.7, supcon_weight=0.3, weight=[1.0, 2.0, 3.0, 4.0])
        model, batch = small(HybridSCL, loss=loss), batch_of()
        twin = copy.deepcopy(model)
        embeddings, labels = self.embeddings(twin, batch), batch["label"].repeat(2)
        ce = F.cross_entropy(twin.head(embeddings), labels, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        torch.testing.assert_close(
            step(model, batch), 0.7 * ce + 0.3 * sup_con_loss(twin.projector(embeddings), labels)
        )

    @pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
    def test_every_trained_part_gets_a_gradient_and_the_fitted_head_none(self, cls: type[Any]) -> None:
        model = small(cls, **({"loss": HybridSupConLoss()} if cls is HybridSCL else {}))
        step(model, batch_of()).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.requires_grad == (cls is HybridSCL or not name.startswith("head.")), name


def trained(root: Path, folder: Path, model: Any, epochs: int = 2, **settings: Any) -> tuple[Trainer, ModelCheckpoint]:
    seed_everything(0, verbose=False)
    data = ICBHIDataModule(root, batch_size=8, duration=1.0, val_fraction=settings.pop("val_fraction", 0.3))
    kept = ModelCheckpoint(folder, monitor="val_score" if data.val_fraction else None, mode="max", save_top_k=-1)
    settings = {"limit_train_batches": 2, "num_sanity_val_steps": 1, "callbacks": [kept]} | settings
    trainer = Trainer(max_epochs=epochs, default_root_dir=folder, **SILENT, **settings)
    trainer.fit(model, datamodule=data)
    return trainer, kept


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (SimCLR, {}),
        (SCL, {"label_key": "sex_age", "view_forward": "concat", "probe": "knn"}),
        (SCL, {"loss": SupConLoss(0.1, memory=20), "probe": "adam"}),
        (MSCL, {"projectors": {"class": Projector(512, 64, 32)}, "loss": MultiSupConLoss(memory=12)}),
        (HybridSCL, {"loss": HybridSupConLoss(0.3, 0.7, weight="balanced")}),
    ],
    ids=["simclr", "scl-knn", "scl-memory-adam", "mscl", "hybrid"],
)
def test_trains_and_restores_from_plain_data(
    cls: type[Any], arguments: dict[str, Any], icbhi_root: Path, tmp_path: Path
) -> None:
    model = small(cls, **arguments)
    trainer, _ = trained(icbhi_root, tmp_path, model)
    assert {"train_loss", "val_score", "val_loss"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = cls.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(restored.state_dict()[name], value), name
    waveform = batch_of()["waveform"]
    assert torch.equal(restored.eval()(waveform), model.eval()(waveform))
    assert restored.history == model.history


def test_what_is_logged_tells_the_terms_and_the_anchors_left_out(icbhi_root: Path, tmp_path: Path) -> None:
    trainer, _ = trained(icbhi_root, tmp_path, small(MSCL), epochs=1)
    names = {"train_class", "train_sex_age", "train_left_out_class", "train_left_out_sex_age"}
    assert names <= trainer.callback_metrics.keys()
    metrics = trainer.callback_metrics
    expected = 0.75 * metrics["train_class"] + 0.25 * metrics["train_sex_age"]
    assert metrics["train_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


class Fits(SCL):
    """Notes the epoch whenever the head is fitted."""

    def fit_head(self) -> None:
        if self._stale:
            self.epochs = [*getattr(self, "epochs", []), self.current_epoch]
        super().fit_head()


class TestWhenTheHeadIsFitted:
    def test_before_each_validation_and_not_for_the_sanity_check(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = small(Fits)
        trained(icbhi_root, tmp_path, model, epochs=3)
        assert model.epochs == [0, 1, 2]

    def test_after_the_last_epoch_where_validation_skips_it(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = small(Fits)
        trained(icbhi_root, tmp_path, model, epochs=3, check_val_every_n_epoch=2)
        assert model.epochs == [1, 2]

    @pytest.mark.parametrize("limits", [{}, {"max_steps": 4}], ids=["epochs", "steps"])
    def test_at_the_end_without_a_validation_side(
        self, limits: dict[str, Any], icbhi_root: Path, tmp_path: Path
    ) -> None:
        model = small(Fits)
        _, kept = trained(icbhi_root, tmp_path, model, epochs=2, val_fraction=0.0, **limits)
        assert model.epochs == [1]
        restored = Fits.load_from_checkpoint(kept.best_model_path, weights_only=True)
        assert torch.equal(restored.head.linear.weight, model.head.linear.weight)

    def test_at_the_end_that_a_callback_makes(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = small(Fits)
        stop = EarlyStopping("train_loss", patience=0, stopping_threshold=100.0, check_on_train_epoch_end=True)
        trained(icbhi_root, tmp_path, model, epochs=3, check_val_every_n_epoch=3, callbacks=[stop])
        assert model.epochs == [1]
        assert not model._stale

    def test_to_averaged_weights_where_a_callback_averages(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = small(SCL, lr=1e-2)
        trained(icbhi_root, tmp_path, model, callbacks=[EMAWeightAveraging(decay=0.5)])
        data = ICBHIDataModule(icbhi_root, duration=1.0, val_fraction=0.3)
        data.setup("fit")
        labels = torch.from_numpy(data.train_set.cycles["label"].to_numpy("int64"))
        expected = fit_head("logistic", Embedded(model.embed(data.train_set), labels), model.classes)
        torch.testing.assert_close(model.head.linear.weight, expected.linear.weight, rtol=0.05, atol=0.05)

    def test_never_as_neighbours_that_are_averaged(self, icbhi_root: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="neighbours cannot be averaged"):
            trained(icbhi_root, tmp_path, small(SCL, probe="knn"), callbacks=[EMAWeightAveraging()])

    def test_a_checkpoint_in_between_says_that_it_was_not(self, icbhi_root: Path, tmp_path: Path) -> None:
        kept = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
        trained(icbhi_root, tmp_path, small(SCL), epochs=2, check_val_every_n_epoch=2, callbacks=[kept])
        first, second = sorted(tmp_path.glob("epoch=*.ckpt"))
        with pytest.warns(UserWarning, match="trained on after its classifier was fitted"):
            SCL.load_from_checkpoint(first, weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SCL.load_from_checkpoint(second, weights_only=True)

    def test_not_when_a_checkpoint_is_validated(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = small(Fits)
        trainer, _ = trained(icbhi_root, tmp_path, model, epochs=1)
        trainer.validate(model, datamodule=ICBHIDataModule(icbhi_root, duration=1.0), verbose=False)
        assert model.epochs == [0]


def test_resuming_goes_on_as_if_nothing_had_happened(icbhi_root: Path, tmp_path: Path) -> None:
    """The memory of earlier batches included."""
    arguments: dict[str, Any] = {"loss": SupConLoss(memory=24), "schedule": "constant"}
    seed_everything(0, verbose=False)
    whole = small(SCL, **arguments)
    part = copy.deepcopy(whole)
    trained(icbhi_root, tmp_path / "whole", whole, epochs=2)
    trainer, _ = trained(icbhi_root, tmp_path / "part", part, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    seed_everything(0, verbose=False)
    data = ICBHIDataModule(icbhi_root, batch_size=8, duration=1.0, val_fraction=0.3)
    resumed = small(SCL, **arguments)
    trainer = Trainer(max_epochs=2, default_root_dir=tmp_path, limit_train_batches=2, **SILENT)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(resumed.state_dict()[name], value), name
    assert torch.equal(resumed.loss.get_extra_state()["embeddings"], whole.loss.get_extra_state()["embeddings"])


@pytest.mark.parametrize("cls", [SCL, HybridSCL], ids=["scl", "hybrid"])
def test_learns_the_synthetic_set(cls: type[Any], icbhi_root: Path) -> None:
    """Its train side, that is: too small a set for more."""
    seed_everything(0, verbose=False)
    data = ICBHIDataModule(icbhi_root, labels="2-class", batch_size=16, duration=2.0, val_fraction=0.0, drop_last=True)
    parts: dict[str, Any] = {
        "features": LogMelSpectrogram(hop_length=1800, n_mels=16),
        "augment": SpecAugment("icbhi_sup", freq_width=3, time_width=3),
        "projector": Projector(512, out_features=128),
    }
    model = small(cls, classes=data.classes, lr=3e-4, weight_decay=0.0, **parts)
    trainer = Trainer(max_epochs=25, enable_checkpointing=False, **SILENT)
    trainer.fit(model, datamodule=data)
    contrast = trainer.callback_metrics["train_supcon" if cls is HybridSCL else "train_loss"]
    assert contrast < math.log(31) - 0.03  # what it is where all 32 views are alike
    if cls is HybridSCL:
        assert trainer.callback_metrics["train_ce"] < math.log(2) - 0.1


def test_heads_follow_the_data_set(sprsound_root: Path, tmp_path: Path) -> None:
    data = SPRSoundDataModule(
        sprsound_root, partial=True, duration=1.0, val_fraction=0.3, metadata={"place": ["location"]}
    )
    loss = MultiSupConLoss({"class": 0.5, "place": 0.25, "sex": 0.25})
    model = small(MSCL, classes=data.classes, scoring=data.scoring, loss=loss)
    trainer = Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    assert {"train_class", "train_place", "train_sex"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: small(SCL, loss=CrossEntropy()), TypeError, r"gives it \(embeddings, labels\).*such as SupConLoss"),
        (lambda: small(SimCLR, loss=SupConLoss()), TypeError, r"gives it \(view1, view2\).*such as NTXentLoss"),
        (lambda: small(SCL, loss=NTXentLoss()), TypeError, "such as SupConLoss"),
        (lambda: small(HybridSCL, loss=SupConLoss()), TypeError, "such as HybridSupConLoss"),
        (lambda: small(MSCL, loss=SupConLoss()), TypeError, "such as MultiSupConLoss"),
        (
            lambda: small(SCL, projector=Projector(128)),
            ValueError,
            "projector takes 128 features, the backbone gives 512",
        ),
        (lambda: small(SCL, view_forward="both"), ValueError, "view_forward must be one of 'separate', 'concat'"),
        (lambda: small(SCL, probe="svm"), ValueError, "probe must be one of 'logistic', 'adam', 'knn', got 'svm'"),
        (
            lambda: small(MSCL, projectors={"device": Projector(512)}),
            ValueError,
            r"projectors names \['device'\], but the loss has the tasks \['class', 'sex_age'\]",
        ),
        (lambda: small(MSCL, label_keys={"device": "device"}), ValueError, r"label_keys names \['device'\]"),
        (lambda: small(MSCL, loss=torch.nn.MSELoss()), TypeError, "weights by task, as MultiSupConLoss does, got MSE"),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


class TestLabelsThatAreOfNoUse:
    def test_absent_from_the_batches(self, icbhi_root: Path) -> None:
        data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0, val_fraction=0.0)
        with pytest.raises(LabelError, match=r"no labels 'age', only patient, .*metadata=\{'age': \[...\]\}"):
            Trainer(max_epochs=1, **SILENT).fit(small(SCL, label_key="age"), datamodule=data)

    def test_what_is_no_label(self) -> None:
        batch = batch_of() | {"index": torch.arange(6), "length": torch.arange(6)}
        with pytest.raises(LabelError, match=r"no labels 'index', only label, sex_age \('label' is the class\)"):
            small(SCL, label_key="index").training_step(batch, 0)

    def test_a_column_of_one_value(self, sprsound_root: Path) -> None:
        data = SPRSoundDataModule(sprsound_root, partial=True, duration=1.0)
        model = small(SCL, label_key="device", classes=data.classes, scoring=data.scoring)
        with pytest.raises(LabelError, match="nothing to contrast by 'device': the train side has 1 value"):
            Trainer(max_epochs=1, **SILENT).fit(model, datamodule=data)

    def test_a_default_label_that_the_data_cannot_give(self, icbhi_root: Path) -> None:
        class NoSex(ICBHIDataModule):
            def dataset(self, download: bool = False) -> ICBHI:
                data = super().dataset(download)
                data.all_cycles["sex"] = None
                return data

        data = NoSex(icbhi_root, duration=1.0)
        with pytest.raises(LabelError, match=r"nothing to contrast by 'sex_age': .*sex"):
            Trainer(max_epochs=1, **SILENT).fit(small(MSCL), datamodule=data)

    def test_a_class_without_a_cycle(self, icbhi_root: Path) -> None:
        class NoWheeze(ICBHIDataModule):
            @property
            def class_counts(self) -> list[int]:
                return [50, 10, 0, 5]

        data = NoWheeze(icbhi_root, duration=1.0)
        with pytest.raises(LabelError, match="no cycle of the train side has the class 'wheeze'"):
            Trainer(max_epochs=1, **SILENT).fit(small(SCL), datamodule=data)


def test_a_label_key_adds_to_the_one_of_the_class() -> None:
    model = small(MSCL, label_keys={"sex_age": "device"})
    assert model.label_keys == {"class": "label", "sex_age": "device"}


def test_metadata_are_asked_for_in_training_alone(icbhi_root: Path, tmp_path: Path) -> None:
    class NoSex(ICBHIDataModule):
        def dataset(self, download: bool = False) -> ICBHI:
            data = super().dataset(download)
            data.all_cycles["sex"] = None
            return data

    model = small(MSCL)
    trained(icbhi_root, tmp_path, model, epochs=1)
    trainer = Trainer(default_root_dir=tmp_path, limit_test_batches=1, **SILENT)
    assert "test_score" in trainer.test(model, datamodule=NoSex(icbhi_root, duration=1.0), verbose=False)[0]


def test_a_transform_of_ones_own_can_be_the_augmentation() -> None:
    class Noise(Transform):
        def forward(self, features: Tensor) -> Tensor:
            return features + torch.randn_like(features)

    one, other = small(SCL, augment=Noise()).views(batch_of())
    assert not torch.equal(one, other)
