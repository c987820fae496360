"""Patch-Mix methods: their steps by hand, checkpoints, and that they learn. The losses themselves: tests/losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from respiro.datamodules import ICBHIDataModule
from respiro.errors import DivergenceError
from respiro.evaluation import evaluate
from respiro.losses import CrossEntropy, MixedCrossEntropy, PatchMixContrastiveLoss
from respiro.methods import PatchMixCE, PatchMixCL, SoundClassifier
from respiro.methods._checkpoint import restore
from respiro.models import AST, CNN6, LinearHead, Projector
from respiro.transforms import CutMix, KaldiFbank, Mixup, PatchMix, SpecAugment, WaveformAugment

SILENT: dict[str, Any] = {
    "logger": False,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
TARGETS = ["grad_block", "grad_flow", "project_block", "project_flow"]


def tiny(frames: int = 98) -> AST:
    return AST("tiny224", num_mel_bins=32, frames=frames, stride=16)


def batch(size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "waveform": torch.randn(size, 16000, generator=generator),
        "label": torch.randint(4, (size,), generator=generator),
    }


def step(model: SoundClassifier) -> Tensor:
    """A training step outside of a trainer."""
    model.logged = lambda loss, labels, **terms: loss  # type: ignore[method-assign]
    torch.manual_seed(11)
    dtype = next(model.parameters()).dtype
    return model.train().training_step(batch() | {"waveform": batch()["waveform"].to(dtype)}, 0)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("target", TARGETS)
def test_one_pass_is_two_passes(target: Any) -> None:
    """The paper's step: cross-entropy of one forward, the contrast of a second one, summed.

    In double precision, as batch norm over four samples makes much of what is rounded.
    """
    torch.manual_seed(0)
    fbank = KaldiFbank(num_mel_bins=32)
    model = PatchMixCL(tiny(), features=fbank, target=target, contrastive_weight=0.7).double()
    ours = step(model)
    ours.backward()
    found = gradients(model)
    model.zero_grad()

    data, ast = batch(), model.backbone
    torch.manual_seed(11)
    x = fbank(data["waveform"].double())
    mixed = PatchMix()(ast.embed_patches(x), ast.grid)
    clean, other = ast(x), ast.forward_tokens(mixed.x)
    projected = model.projector(other)
    goal = model.projector(clean) if "project" in target else clean
    goal = goal.detach() if "block" in target else goal
    ce = torch.nn.functional.cross_entropy(model.head(clean), data["label"])
    unit = torch.nn.functional.normalize
    similarities = unit(projected) @ unit(goal).T / 0.06
    log_p = similarities.log_softmax(1)
    rows = torch.arange(4)
    cl = -(mixed.lam * log_p[rows, rows] + (1 - mixed.lam) * log_p[rows, mixed.index]).mean()
    (ce + 0.7 * cl).backward()
    torch.testing.assert_close(ours, ce + 0.7 * cl, rtol=1e-5, atol=1e-6)
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_patch_mix_with_cross_entropy_by_hand() -> None:
    torch.manual_seed(0)
    fbank = KaldiFbank(num_mel_bins=32)
    model = PatchMixCE(tiny(), features=fbank, patch_mix=PatchMix("time"))
    found = step(model)
    data, ast = batch(), model.backbone
    torch.manual_seed(11)
    tokens = ast.embed_patches(fbank(data["waveform"]))
    mixed = PatchMix("time")(tokens, ast.grid)
    log_p = model.head(ast.forward_tokens(mixed.x)).log_softmax(1)
    rows, labels = torch.arange(4), data["label"]
    expected = -(mixed.lam * log_p[rows, labels] + (1 - mixed.lam) * log_p[rows, labels[mixed.index]]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mix", [Mixup(), CutMix(per_sample=True)], ids=["mixup", "cutmix"])
def test_mixed_inputs_through_the_sound_classifier(mix: Any) -> None:
    torch.manual_seed(0)
    model = SoundClassifier(CNN6().eval(), mix=mix, loss=MixedCrossEntropy())
    found = step(model)
    data = batch()
    torch.manual_seed(11)
    mixed = mix(model.features(data["waveform"]))
    log_p = model.head(model.backbone(mixed.x)).log_softmax(1)
    rows, labels = torch.arange(4), data["label"]
    expected = -(mixed.lam * log_p[rows, labels] + (1 - mixed.lam) * log_p[rows, labels[mixed.index]]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_mixing_takes_a_loss_on_two_labels_by_default() -> None:
    assert isinstance(SoundClassifier(CNN6(), mix=Mixup()).loss, MixedCrossEntropy)
    assert isinstance(PatchMixCE(tiny()).loss, MixedCrossEntropy)
    assert isinstance(PatchMixCL(tiny()).loss, CrossEntropy)


def methods() -> dict[str, SoundClassifier]:
    common: dict[str, Any] = {"features": KaldiFbank(num_mel_bins=32), "lr": 1e-3}
    augment = SpecAugment(freq_width=8, time_width=30)
    return {
        "patchmix-ce": PatchMixCE(tiny(), augment=augment, patch_mix=PatchMix("block", 0.5), **common),
        "patchmix-cl": PatchMixCL(
            tiny(),
            projector=Projector(192, 64, 48),
            contrastive=PatchMixContrastiveLoss(0.1, "different-label", gather=True),
            target="project_flow",
            **common,
        ),
        "mixup": SoundClassifier(tiny(), mix=Mixup(0.4), head=LinearHead(192, 4, layer_norm=True), **common),
    }


@pytest.mark.parametrize("name", ["patchmix-ce", "patchmix-cl", "mixup"])
def test_fit_save_restore_predict(icbhi_root: Path, tmp_path: Path, name: str) -> None:
    seed_everything(0, verbose=False)
    model = methods()[name]
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0)
    trainer = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    again = type(model).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    waveform = batch()["waveform"]
    expected = model.eval()(waveform)
    torch.testing.assert_close(again.eval()(waveform), expected, rtol=0, atol=0)
    torch.testing.assert_close(restore(path).eval()(waveform), expected, rtol=0, atol=0)
    assert dict(again.hparams) == dict(model.hparams)
    table = again.predict(waveform)
    assert list(table.filter(like="p_").sum(axis=1).round(5)) == [1.0] * 4
    assert len(evaluate(again, data, split="val").predictions) == len(data.val_set)


def test_every_method_keeps_what_it_was_built_with() -> None:
    """Arguments end up in the parts, the attributes or the hyperparameters, whatever the class."""
    for model in methods().values():
        again = type(model)(**model.hparams)
        assert dict(again.hparams) == dict(model.hparams)
        assert repr(again) == repr(model)


def test_resuming_draws_what_an_uninterrupted_training_draws(icbhi_root: Path, tmp_path: Path) -> None:
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0)
    options: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2, "default_root_dir": tmp_path, **SILENT}
    seed_everything(0, verbose=False)
    whole = methods()["patchmix-ce"]
    whole.backbone.pretrained = {"source": "AST_AUDIOSET", "sha256": "dfc3"}  # as load_weights notes
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    Trainer(**options, callbacks=[every]).fit(whole, datamodule=data)
    resumed = methods()["patchmix-ce"]
    Trainer(**options).fit(resumed, datamodule=data, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    for (name, expected), value in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)
    assert resumed.protocol["pretrained"] == whole.protocol["pretrained"] == whole.backbone.pretrained
    assert len(resumed.history) == 1


def test_a_real_moving_average_is_what_the_checkpoint_holds(icbhi_root: Path, tmp_path: Path) -> None:
    """Lightning's callback averages a copy; the released code averages the live weights."""
    seen: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            seen.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    seed_everything(0, verbose=False)
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0, val_fraction=0.0)
    callbacks = [EMAWeightAveraging(decay=0.5), Watch()]
    trainer = Trainer(max_epochs=1, limit_train_batches=3, callbacks=callbacks, default_root_dir=tmp_path, **SILENT)
    model = methods()["patchmix-ce"]
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "average.ckpt")
    again = PatchMixCE.load_from_checkpoint(tmp_path / "average.ckpt", weights_only=True)
    for name, value in again.named_parameters():
        average = seen[0][name]  # the first average is a copy
        for weights in seen[1:]:
            average = 0.5 * average + 0.5 * weights[name]
        torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-6, msg=name)


def test_a_training_that_diverges_stops(icbhi_root: Path, tmp_path: Path) -> None:
    model = SoundClassifier(CNN6())
    torch.nn.init.constant_(model.head.linear.bias, float("nan"))  # type: ignore[union-attr, arg-type]
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=0.5, val_fraction=0.0)
    trainer = Trainer(max_epochs=1, limit_train_batches=2, default_root_dir=tmp_path, **SILENT)
    with pytest.raises(DivergenceError, match="the training loss is nan in epoch 0, batch 0; lower lr"):
        trainer.fit(model, datamodule=data)


class _OneBadBatch(SoundClassifier):
    def training_features(self, batch: Any) -> Tensor:
        bad = float("nan") if self.trainer.fit_loop.batch_idx == 1 else 0.0
        return super().training_features(batch) + bad


def test_one_bad_batch_is_not_passed_over(icbhi_root: Path, tmp_path: Path) -> None:
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=0.5, val_fraction=0.0)
    trainer = Trainer(max_epochs=2, limit_train_batches=3, default_root_dir=tmp_path, **SILENT)
    with pytest.raises(DivergenceError, match="the training loss is nan in epoch 0; lower lr"):
        trainer.fit(_OneBadBatch(CNN6()), datamodule=data)


def test_a_prediction_is_a_number() -> None:
    waveform = torch.zeros(3, 16000)
    waveform[1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"probabilities of cycle 1 \(1 of 3\) are not finite; look for values"):
        SoundClassifier(CNN6()).predict(waveform)


def test_an_ast_gets_the_features_and_the_head_it_was_made_for() -> None:
    for method in (SoundClassifier, PatchMixCE, PatchMixCL):
        model = method(tiny())
        assert isinstance(model.features, KaldiFbank)
        assert model.features.num_features == 32
        assert model.head.init_args["layer_norm"]
        assert model(batch()["waveform"]).shape == (4, 4)
    assert not SoundClassifier(CNN6()).head.init_args["layer_norm"]


def test_waveforms_are_augmented_at_their_rate(icbhi_root: Path, tmp_path: Path) -> None:
    model = SoundClassifier(CNN6(), waveform_augment=WaveformAugment(4000, shift=0.1))
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0)
    with pytest.raises(ValueError, match="has 16000 Hz, the waveform_augment expect 4000 Hz; give both the same"):
        Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT).fit(model, datamodule=data)


def test_augmentation_acts_in_training_alone() -> None:
    augment = WaveformAugment(gain=(-20.0, -10.0), p=1.0)
    model = PatchMixCE(tiny(), features=KaldiFbank(num_mel_bins=32), waveform_augment=augment)
    plain = model.features(batch()["waveform"])
    assert (model.train().training_features(batch()) < plain).all()
    torch.testing.assert_close(model.eval().training_features(batch()), plain, rtol=0, atol=0)


def test_a_compiled_backbone_trains(icbhi_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it computes the same is tested with the AST; compiling takes long."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    model = PatchMixCE(tiny(), features=KaldiFbank(num_mel_bins=32), compile=True)
    calls: list[str] = []
    monkeypatch.setattr(model.backbone, "compile", lambda: calls.append("compiled"))
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0, val_fraction=0.0)
    trainer = Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    assert calls == ["compiled"]


def test_a_train_side_smaller_than_a_batch(icbhi_root: Path, tmp_path: Path) -> None:
    data = ICBHIDataModule(icbhi_root, batch_size=1000, duration=0.5, val_fraction=0.0, drop_last=True)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT)
    with pytest.raises(ValueError, match=r"\d+ train cycles make no batch of 1000, and a smaller one is dropped"):
        trainer.fit(SoundClassifier(CNN6()), datamodule=data)


def test_a_batch_of_one_is_found_before_training(icbhi_root: Path, tmp_path: Path) -> None:
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0, val_fraction=0.0)
    data.prepare_data()
    data.setup("fit")
    data.train_set = data.train_set.subset(data.train_set.cycles.index[:9])
    data.setup = lambda stage: None  # type: ignore[method-assign]
    model = PatchMixCE(tiny(), features=KaldiFbank(num_mel_bins=32))
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT)
    with pytest.raises(ValueError, match=r"9 train samples in batches of 4 leave a batch of 1.*drop_last=True"):
        trainer.fit(model, datamodule=data)
    data.drop_last = True
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PatchMixCL(CNN6()), TypeError, "PatchMixCL mixes tokens, which CNN6 has none of.*AST"),  # type: ignore[arg-type]
        (lambda: PatchMixCE(CNN6()), TypeError, "PatchMixCE mixes tokens, which CNN6 has none of"),  # type: ignore[arg-type]
        (lambda: PatchMixCL(tiny(), target="both"), ValueError, "target must be one of 'grad_block'"),  # type: ignore[arg-type]
        (
            lambda: PatchMixCL(tiny(), projector=Projector(192, 192, 64)),
            ValueError,
            "target 'grad_block' compares projections with embeddings.*got 64 and 192.*out_features=192",
        ),
        (lambda: PatchMixCL(tiny(), lr_floor=2.0), ValueError, r"lr_floor must be in \[0, 1\], got 2.0"),
        (
            lambda: PatchMixCL(tiny(), projector=Projector(768)),
            ValueError,
            "takes 768 features, the backbone gives 192",
        ),
        (lambda: PatchMixCL(tiny(), contrastive_weight=-1.0), ValueError, "contrastive_weight must be finite and not"),
        (
            lambda: PatchMixCL(tiny(), loss=MixedCrossEntropy()),
            TypeError,
            r"gives it \(logits, labels\); use a loss such as CrossEntropy",
        ),
        (
            lambda: PatchMixCE(tiny(), loss=CrossEntropy()),
            TypeError,
            "index, lam.; use a loss such as MixedCrossEntropy",
        ),
        (
            lambda: PatchMixCE(tiny(), patch_mix=Mixup()),
            TypeError,
            "patch_mix must mix tokens, as PatchMix does, got Mixup",
        ),
        (lambda: SoundClassifier(CNN6(), mix=PatchMix()), TypeError, "mix must mix features, as Mixup or CutMix does"),
        (lambda: SoundClassifier(CNN6(), mix=SpecAugment()), TypeError, "mix must mix features.*got SpecAugment"),
        (
            lambda: SoundClassifier(CNN6(), mix=Mixup(), loss=CrossEntropy()),
            TypeError,
            "index, lam.; use a loss such as MixedCross",
        ),
        (
            lambda: SoundClassifier(CNN6(), loss=MixedCrossEntropy()),
            TypeError,
            "labels.; use a loss such as CrossEntropy",
        ),
        (lambda: SoundClassifier(CNN6(), augment=Mixup()), TypeError, "augment cannot mix samples; give it as mix"),
        (
            lambda: SoundClassifier(tiny(), head=LinearHead(768, 4)),
            ValueError,
            "takes 768 features, the backbone gives",
        ),
        (lambda: PatchMixCL(tiny(), contrastive=CrossEntropy()), TypeError, "contrastive must compare embeddings"),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("name", ["patchmix-ce", "patchmix-cl"])
def test_learns_the_synthetic_set(icbhi_root: Path, tmp_path: Path, name: str) -> None:
    """Two of the twelve blocks, from random weights: the loss falls, and the score rises above the floor of 0.5."""
    seed_everything(0, verbose=False)
    ast = AST("tiny224", num_mel_bins=32, frames=298, stride=[8, 16])
    del ast.v.blocks[2:]
    settings: dict[str, Any] = {
        "classes": ("normal", "abnormal"),
        "features": KaldiFbank(num_mel_bins=32, f_max=2000.0),
        "patch_mix": PatchMix("time", beta=0.3),
        "lr": 3e-4,
        "warmup": 0.1,
    }
    model: SoundClassifier
    if name == "patchmix-ce":
        model = PatchMixCE(ast, loss=MixedCrossEntropy("balanced"), **settings)
    else:
        model = PatchMixCL(ast, loss=CrossEntropy("balanced"), **settings)
    losses = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    data = ICBHIDataModule(
        icbhi_root, batch_size=8, duration=3.0, labels="2-class", val_fraction=0.0, drop_last=True, seed=0
    )
    trainer = Trainer(max_epochs=12, callbacks=[Watch()], default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    assert losses[-1] < 0.85 * losses[0]
    data.setup("fit")
    data.test_set = data.train_set
    data.setup = lambda stage: None  # type: ignore[method-assign]
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test_score"] > 0.65
