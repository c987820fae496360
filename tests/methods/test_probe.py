"""LinearProbe, and the heads that are fitted to embeddings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from respiro.cli import main
from respiro.datamodules import ICBHIDataModule
from respiro.errors import LabelError
from respiro.evaluation import evaluate
from respiro.methods import SCL, LinearProbe, SoundClassifier
from respiro.methods._probe import Embedded, fit_head, scorer
from respiro.models import CNN6, LinearHead, load_weights
from respiro.transforms import LogMelSpectrogram, SpecAugment

SILENT: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


def clusters(sizes: list[int], features: int = 6, seed: int = 0) -> Embedded:
    """Overlapping clusters, one a class, on scales that differ."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    centres = torch.randn(len(sizes), features, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(len(labels), features, generator=generator)
    return Embedded((centres[labels] + noise) * torch.logspace(-2, 2, features) + 5.0, labels)


NAMES = ("normal", "crackle", "wheeze", "both")


def small_features() -> LogMelSpectrogram:
    return LogMelSpectrogram(hop_length=1000, n_mels=16)


class TestFittedHeads:
    @pytest.mark.parametrize("sizes", [[60, 30, 20], [70, 25]], ids=["three", "two"])
    def test_logistic_is_scikit_learns_on_standardised_embeddings(self, sizes: list[int]) -> None:
        train = clusters(sizes)
        oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, class_weight="balanced", max_iter=5000))
        oracle.fit(train.embeddings.double().numpy(), train.labels.numpy())
        head = fit_head("logistic", train, NAMES[: len(sizes)], strength=0.5)
        expected = oracle.predict_proba(train.embeddings.double().numpy())
        with torch.no_grad():
            np.testing.assert_allclose(head(train.embeddings).softmax(1).numpy(), expected, atol=1e-3)

    def test_logistic_takes_a_feature_that_never_changes(self) -> None:
        train = clusters([30, 30, 30])
        constant = torch.cat([train.embeddings, torch.full((90, 1), 3.0)], dim=1)
        with torch.no_grad():
            logits = fit_head("logistic", Embedded(constant, train.labels), NAMES[:3])(constant)
        assert logits.isfinite().all()

    def test_knn_is_scikit_learns_where_classes_are_equal(self) -> None:
        train, other = clusters([30, 30, 30]), clusters([20, 20, 20], seed=1)
        oracle = KNeighborsClassifier(5, metric="cosine").fit(train.embeddings.numpy(), train.labels.numpy())
        head = fit_head("knn", train, NAMES[:3], neighbors=5)
        votes = torch.from_numpy(oracle.predict_proba(other.embeddings.numpy()))
        logits = head(other.embeddings)
        clear = votes.sort(1).values[:, -1] > votes.sort(1).values[:, -2]
        assert torch.equal(logits.argmax(1)[clear], votes.argmax(1)[clear])

    def test_adam_is_the_released_probe_written_out(self) -> None:
        train = clusters([300, 40, 40])
        head = fit_head("adam", train, NAMES[:3])
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        linear = nn.Linear(6, 3)
        optimizer = torch.optim.Adam(linear.parameters(), lr=0.1, betas=(0.9, 0.999), weight_decay=1e-4)
        weight = 1 / torch.tensor([300.0, 40.0, 40.0])
        for _ in range(100):
            for rows in torch.randperm(380).split(128):
                loss = F.cross_entropy(linear(train.embeddings[rows]), train.labels[rows], weight / weight.sum())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.random.set_rng_state(state)
        torch.testing.assert_close(head.linear.weight, linear.weight, rtol=1e-3, atol=1e-3)

    def test_adam_takes_the_epoch_that_scores_best(self) -> None:
        """A score that knows the epochs: the best is the third of a hundred."""
        train, scores = clusters([50, 50]), iter([0.1, 0.2, 0.9, *np.linspace(0.3, 0.8, 97)])
        seen: list[Tensor] = []

        def score(head: LinearHead) -> float:
            seen.append(head.linear.weight.detach().clone())
            return next(scores)

        head = fit_head("adam", train, NAMES[:2], score)
        assert len(seen) == 100
        assert torch.equal(head.linear.weight, seen[2])

    def test_the_score_is_icbhis(self) -> None:
        val = Embedded(torch.eye(4), torch.tensor([0, 1, 2, -1]))
        head = LinearHead(4, 3)
        with torch.no_grad():
            head.linear.weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]))
            head.linear.bias.zero_()
        assert scorer(val, ("normal", "crackle", "wheeze"), "icbhi")(head) == pytest.approx((1 / 1 + 1 / 2) / 2)

    @pytest.mark.parametrize("probe", ["logistic", "adam", "knn"])
    def test_unknown_labels_are_left_out(self, probe: Any) -> None:
        train = clusters([40, 30])
        more = Embedded(
            torch.cat([train.embeddings, torch.full((5, 6), 100.0)]), torch.cat([train.labels, torch.full((5,), -1)])
        )
        states = [fit_head(probe, side, NAMES[:2]).state_dict() for side in (train, more)]
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name])

    @pytest.mark.parametrize("probe", ["logistic", "adam", "knn"])
    def test_fitting_does_not_disturb_what_the_training_draws(self, probe: Any) -> None:
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        fit_head(probe, clusters([20, 20]), NAMES[:2])
        assert torch.equal(torch.rand(1), expected)

    @pytest.mark.parametrize("probe", ["logistic", "adam", "knn"])
    def test_embeddings_that_are_not_finite_are_refused(self, probe: Any) -> None:
        train = clusters([20, 20])
        train.embeddings[3, 2] = float("nan")
        with pytest.raises(ValueError, match="embeddings of the train side are not finite; lower lr"):
            fit_head(probe, train, NAMES[:2])

    @pytest.mark.parametrize("probe", ["logistic", "adam", "knn"])
    def test_a_class_without_a_sample_is_refused(self, probe: Any) -> None:
        with pytest.raises(LabelError, match="no cycle of the train side has the class 'wheeze'"):
            fit_head(probe, clusters([20, 20]), NAMES)


def probed(root: Path, folder: Path, model: LinearProbe, **arguments: Any) -> tuple[ICBHIDataModule, ModelCheckpoint]:
    seed_everything(0, verbose=False)
    data = ICBHIDataModule(root, batch_size=8, duration=1.0, **({"val_fraction": 0.3} | arguments))
    best = ModelCheckpoint(folder, monitor="val_score" if data.val_fraction else None, mode="max")
    Trainer(max_epochs=5, default_root_dir=folder, callbacks=[best], **SILENT).fit(model, datamodule=data)
    return data, best


class TestLinearProbe:
    @pytest.mark.parametrize("probe", ["logistic", "adam", "knn"])
    def test_one_epoch_fits_the_head_and_nothing_else(self, probe: Any, icbhi_root: Path, tmp_path: Path) -> None:
        encoder = CNN6()
        before = copy.deepcopy(encoder.state_dict())
        model = LinearProbe(encoder, features=small_features(), probe=probe, neighbors=3)
        data, best = probed(icbhi_root, tmp_path, model)
        assert model.trainer.current_epoch == 1
        for name, tensor in before.items():
            assert torch.equal(encoder.state_dict()[name], tensor), name
        assert all(parameter.requires_grad for parameter in encoder.parameters())
        restored = LinearProbe.load_from_checkpoint(best.best_model_path, weights_only=True)
        waveform = torch.randn(3, 16000)
        assert torch.equal(restored.eval()(waveform), model.eval()(waveform))
        assert (restored.probe, restored.neighbors) == (probe, 3)
        assert evaluate(restored, data).metrics["score"] >= 0

    def test_the_head_is_fitted_to_the_clean_train_side(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = LinearProbe(CNN6(), features=small_features())
        data, _ = probed(icbhi_root, tmp_path, model)
        embeddings = model.embed(data.train_set)
        labels = torch.from_numpy(data.train_set.cycles["label"].to_numpy("int64"))
        expected = fit_head("logistic", Embedded(embeddings, labels), NAMES)
        with torch.no_grad():
            torch.testing.assert_close(
                model.head(embeddings).softmax(1), expected(embeddings).softmax(1), rtol=1e-3, atol=1e-3
            )

    def test_without_a_validation_side(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = LinearProbe(CNN6(), features=small_features(), probe="knn")
        data, best = probed(icbhi_root, tmp_path, model, val_fraction=0.0)
        restored = LinearProbe.load_from_checkpoint(best.best_model_path, weights_only=True)
        assert len(restored.head.labels) == len(data.train_set)

    def test_fitted_again_it_takes_no_old_head(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = LinearProbe(CNN6(), features=small_features(), probe="knn")
        probed(icbhi_root, tmp_path, model)
        first = model.head.embeddings.clone()
        with torch.no_grad():
            model.backbone.conv_block4.bn1.weight.mul_(torch.linspace(0.1, 2, 512))
        probed(icbhi_root, tmp_path, model)
        assert not torch.equal(model.head.embeddings, first)

    def test_restored_and_saved_again(self, icbhi_root: Path, tmp_path: Path) -> None:
        model = LinearProbe(CNN6(), features=small_features(), probe="knn")
        data, best = probed(icbhi_root, tmp_path, model)
        restored = LinearProbe.load_from_checkpoint(best.best_model_path, weights_only=True)
        trainer = Trainer(default_root_dir=tmp_path, **SILENT)
        trainer.validate(restored, datamodule=data, verbose=False)
        trainer.save_checkpoint(tmp_path / "again.ckpt")
        again = LinearProbe.load_from_checkpoint(tmp_path / "again.ckpt", weights_only=True)
        assert torch.equal(again.head.embeddings, model.head.embeddings)

    @pytest.mark.parametrize("probe", ["logistic", "adam", "knn"])
    @pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
    def test_in_any_precision(self, precision: Any, probe: Any, icbhi_root: Path, tmp_path: Path) -> None:
        data = ICBHIDataModule(icbhi_root, batch_size=8, duration=1.0, val_fraction=0.3)
        model = LinearProbe(CNN6(), features=small_features(), probe=probe)
        trainer = Trainer(precision=precision, enable_checkpointing=False, default_root_dir=tmp_path, **SILENT)
        trainer.fit(model, datamodule=data)
        assert trainer.callback_metrics["val_loss"].isfinite()
        assert {value.dtype for value in model.head.state_dict().values()} <= {torch.float32, torch.int64}

    def test_what_the_encoder_was_trained_on_goes_along(self, icbhi_root: Path, tmp_path: Path) -> None:
        """An encoder chosen on the test side leaves its stamp on every probe of it, in memory and from a file."""
        data = ICBHIDataModule(icbhi_root, batch_size=8, duration=1.0, select_on="test")
        augment = SpecAugment("icbhi_sup", freq_width=4, time_width=4)
        scl = SCL(CNN6(), features=small_features(), augment=augment, probe="knn")
        trainer = Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **SILENT)
        trainer.fit(scl, datamodule=data)
        trainer.save_checkpoint(tmp_path / "scl.ckpt")
        filled = CNN6()
        load_weights(filled, tmp_path / "scl.ckpt")
        for number, encoder in enumerate((scl.backbone, filled)):
            model = LinearProbe(encoder, features=scl.features, probe="knn")
            own, best = probed(icbhi_root, tmp_path / str(number), model)
            restored = LinearProbe.load_from_checkpoint(best.best_model_path, weights_only=True)
            assert [record["select_on"] for record in restored.history] == ["test", "val"]
            assert "TEST-SELECTED" in str(evaluate(restored, own))

    def test_an_encoder_without_training_is_told(self, icbhi_root: Path, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="neither trained nor filled with weights"):
            probed(icbhi_root, tmp_path, LinearProbe(CNN6(), features=small_features(), probe="knn"))

    def test_features_that_the_encoder_does_not_know_are_told(self, icbhi_root: Path, tmp_path: Path) -> None:
        data = ICBHIDataModule(icbhi_root, batch_size=8, duration=1.0)
        trained = SoundClassifier(CNN6(), features=small_features())
        trainer = Trainer(max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, **SILENT)
        trainer.fit(trained, datamodule=data)
        trainer.save_checkpoint(tmp_path / "trained.ckpt")
        model = LinearProbe(CNN6(), features=LogMelSpectrogram(hop_length=500, n_mels=16), probe="knn")
        load_weights(model.backbone, tmp_path / "trained.ckpt")
        with pytest.warns(UserWarning, match=r"trained on LogMelSpectrogram\(.*hop_length=1000.*gets .*hop_length=500"):
            probed(icbhi_root, tmp_path, model)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"probe": "svm"}, "probe must be one of 'logistic', 'adam', 'knn', got 'svm'"),
            ({"strength": 0.0}, "strength must be positive and finite, got 0.0"),
            ({"neighbors": 0}, "neighbors must be at least 1, got 0"),
        ],
        ids=["probe", "strength", "neighbors"],
    )
    def test_what_has_no_meaning_is_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LinearProbe(CNN6(), **arguments)


class TestEmbed:
    def test_takes_waveforms_batches_and_data_sets(self, icbhi_root: Path) -> None:
        data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0)
        data.setup("fit")
        model = SoundClassifier(CNN6(), features=small_features()).train()
        side = data.val_set
        batch = torch.utils.data.default_collate([side[row] for row in range(3)])
        embeddings = model.embed(side)
        assert embeddings.shape == (len(side), 512)
        torch.testing.assert_close(model.embed(batch), embeddings[:3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.embed(batch["waveform"]), embeddings[:3], rtol=1e-4, atol=1e-4)
        assert model.training


def test_both_stages_from_the_command_line(
    icbhi_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = [
        "--data",
        "ICBHIDataModule",
        "--data.root",
        str(icbhi_root),
        "--data.duration",
        "1.0",
        "--trainer.accelerator",
        "cpu",
    ]
    common += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    common += ["--model.backbone", "CNN6", "--model.features", "LogMelSpectrogram"]
    common += ["--model.features.hop_length", "1000", "--model.features.n_mels", "16"]
    augment = ["--model.augment", "SpecAugment", "--model.augment.freq_width", "4", "--model.augment.time_width", "4"]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    main(["fit", "--model", "SCL", *common, *augment, *limits])
    (first,) = tmp_path.rglob("last.ckpt")
    main(["test", str(first)])
    assert "selection on val" in capsys.readouterr().out
    second = ["--model", "LinearProbe", *common, "--model.probe", "knn", "--weights", str(first)]
    main(["fit", *second, "--checkpoint.dirpath", "second"])
    model = LinearProbe.load_from_checkpoint(tmp_path / "second" / "last.ckpt", weights_only=True)
    assert len(model.history) == 2
