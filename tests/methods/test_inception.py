"""InceptionFusion: its step as the equations have it, its centres, its checkpoint, its training on SPRSound."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from respiro.component import Backbone, Loss
from respiro.datamodules import SPRSoundDataModule
from respiro.errors import LabelError
from respiro.losses import CenterLoss, CrossEntropy, MixedCrossEntropy, MultiObjectiveLoss, TripletLoss
from respiro.methods import InceptionFusion, SoundClassifier
from respiro.models import CNN6, InceptionResidual, SpectrogramFusion
from respiro.transforms import (
    GammatoneSpectrogram,
    LogMelSpectrogram,
    Mixup,
    MorletScalogram,
    SpecAugment,
    StackedFeatures,
    WaveformAugment,
)

BANDS = 16
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def branch() -> InceptionResidual:
    return InceptionResidual((8, 16), 12, num_heads=2, dropout=(0.0, 0.0), embedding_dropout=0.0)


def fusion(combination: str = "linear") -> SpectrogramFusion:
    branches: list[Backbone] = [branch(), branch()]
    return SpectrogramFusion(branches, [BANDS, BANDS], combination, num_features=10)  # type: ignore[arg-type]


def front_ends() -> StackedFeatures:
    return StackedFeatures(
        [GammatoneSpectrogram(num_bands=BANDS), MorletScalogram(num_scales=BANDS, f_min=100.0)]  # short waves
    )


def objective(
    classification: Loss | None = None, size: int = 10, classes: int = 2, **weights: Any
) -> MultiObjectiveLoss:
    return MultiObjectiveLoss(classification or CrossEntropy(), CenterLoss(classes, size), TripletLoss(), **weights)


def small(**arguments: Any) -> InceptionFusion:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "backbone": fusion(),
        "features": front_ends(),
        "classes": ["normal", "adventitious"],
        "scoring": "sprsound",
        "loss": objective(),
    }
    return InceptionFusion(**(defaults | arguments))


def batch_of(size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"waveform": torch.randn(size, 4000, generator=generator), "label": torch.arange(size) % 2}


@pytest.fixture
def data(sprsound_root: Path) -> SPRSoundDataModule:
    return SPRSoundDataModule(
        sprsound_root,
        partial=True,
        sample_rate=8000,
        duration=0.5,
        batch_size=16,
        samples_per_class=4,
        val_fraction=0.3,
    )


def step(model: InceptionFusion, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a step and what it logs."""
    logged: dict[str, Tensor] = {}

    def keep(loss: Tensor, labels: Tensor, **terms: Tensor) -> Tensor:
        logged.update(terms)
        return loss

    model.logged = keep  # type: ignore[method-assign]
    return model.train().training_step(batch, 0), logged


def test_a_step_is_the_weighted_sum_of_its_terms() -> None:
    model, batch = small(), batch_of()
    nn.init.normal_(model.center.centers)  # type: ignore[union-attr]
    loss, logged = step(model, batch)
    gammatone, wavelet = model.features(batch["waveform"]).split(BANDS, dim=2)
    branches = [part(x) for part, x in zip(model.backbone.branches, (gammatone, wavelet), strict=True)]
    z = model.backbone.combine(branches)
    labels = batch["label"]
    ce = cross_entropy(model.head(z), labels)
    auxiliary = sum(cross_entropy(head(e), labels) for head, e in zip(model.branch_heads, branches, strict=True))
    center = sum((z[i] - model.center.centers[labels[i]]).square().sum() for i in range(8)) / 16  # type: ignore[union-attr]
    directions = z / z.norm(dim=1, keepdim=True)
    triplets = []
    for i in range(8):
        distances = [
            (float((directions[i] - directions[j]).norm().detach()), int(labels[j] == labels[i]))
            for j in range(8)
            if j != i
        ]
        far, near = max(d for d, same in distances if same), min(d for d, same in distances if not same)
        triplets.append(max(0.0, 0.3 + far - near))
    expected = {"classification": ce, "center": center, "triplet": sum(triplets) / 8, "auxiliary": auxiliary}
    for name, value in expected.items():
        assert float(logged[f"train_{name}"]) == pytest.approx(float(value), rel=1e-4), name
    total = ce + 0.005 * center + 0.1 * expected["triplet"] + 0.3 * auxiliary
    assert float(loss) == pytest.approx(float(total), rel=1e-4)


def test_without_weights_it_is_plain_cross_entropy() -> None:
    model, batch = small(loss=objective(center_weight=0, triplet_weight=0, auxiliary_weight=0)), batch_of()
    loss, logged = step(model, batch)
    plain = cross_entropy(model.head(model.backbone(model.features(batch["waveform"]))), batch["label"])
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    assert list(logged) == ["train_classification"]
    assert len(model.branch_heads) == 0


def test_mixed_samples_take_no_part_in_the_metric_terms() -> None:
    class Half(Mixup):
        """Mixes the second half of the batch only."""

        def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Any:
            mixed = super().forward(features, generator)
            lam = mixed.lam.expand(len(features)).clone()
            lam[:4] = 1.0
            x = torch.cat([features[:4], mixed.x[4:]])
            return type(mixed)(x, mixed.index, lam)

    batch = batch_of()
    model = small(mix=Half(0.4), loss=objective(MixedCrossEntropy()))
    torch.manual_seed(5)
    _, logged = step(model, batch)
    torch.manual_seed(5)
    mixed = model.mix(model.features(batch["waveform"]))  # type: ignore[misc]
    z = model.backbone(mixed.x)
    assert float(logged["train_center"]) == pytest.approx(float(z[:4].square().sum() / 8), rel=1e-4)
    assert ((mixed.lam[4:] > 0) & (mixed.lam[4:] < 1)).all()


@pytest.mark.parametrize("combination", ["linear", "concat", "mean", "learned", "gated", "product"])
def test_every_combination_trains_every_parameter(combination: str) -> None:
    backbone = fusion(combination)
    model = small(backbone=backbone, loss=objective(size=backbone.num_features))
    loss, _ = step(model, batch_of())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_single_branch_has_no_auxiliary_heads() -> None:
    model = small(backbone=branch(), features=GammatoneSpectrogram(num_bands=BANDS), loss=objective(size=12))
    loss, logged = step(model, batch_of())
    loss.backward()
    assert set(logged) == {"train_classification", "train_center", "train_triplet"}
    assert len(model.branch_heads) == 0


def test_any_backbone_and_any_front_end_can_be_a_branch() -> None:
    features = StackedFeatures(
        [GammatoneSpectrogram(num_bands=BANDS), LogMelSpectrogram(8000, hop_length=208, n_mels=32)]
    )
    model = small(backbone=SpectrogramFusion([branch(), CNN6()], features.bins, num_features=10), features=features)
    assert model(batch_of()["waveform"]).shape == (8, 2)


def test_prediction_needs_no_auxiliary_head() -> None:
    model = small().eval()
    before = model(batch_of()["waveform"])
    for head in model.branch_heads:
        nn.init.normal_(head.linear.weight)
    assert torch.equal(model(batch_of()["waveform"]), before)


@pytest.mark.parametrize("clip", [None, 0.01], ids=["plain", "clipped"])
@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_the_centres_move_by_their_own_rate(weighting: str, clip: float | None) -> None:
    """After one step they are where plain gradient descent on the unweighted term takes them, and so move once."""
    model = small(optimizer="adamw", lr=1e-3, loss=objective(center_weight=0.005, weighting=weighting))
    center = model.center
    assert center is not None
    trainer = Trainer(max_steps=1, enable_checkpointing=False, gradient_clip_val=clip, **SILENT)
    seen: dict[str, Tensor] = {}
    step_of = model.training_step

    def record(batch: Any, batch_idx: int) -> Tensor:
        x = model.training_features(batch)
        seen.update(z=model.backbone(x).detach(), labels=batch["label"], before=center.centers.detach().clone())
        return step_of(batch, batch_idx)

    model.training_step = record  # type: ignore[method-assign]
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in batch_of().items()} for i in range(8)], batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader)
    expected = seen["before"].clone()
    for label in range(2):
        own = seen["z"][seen["labels"] == label]
        expected[label] += 0.5 * (own - seen["before"][label]).sum(0) / 8
    torch.testing.assert_close(center.centers.detach(), expected, rtol=5e-3, atol=1e-5)
    assert center.centers.abs().sum() > 0


def test_it_trains_and_comes_back(data: SPRSoundDataModule, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = small(
        mix=Mixup(0.4, p=0.5),
        augment=SpecAugment("LB", freq_width=4, time_width=4, time_warp=0, roll=True),
        loss=objective(MixedCrossEntropy()),
    )
    trainer = Trainer(max_epochs=2, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    terms = ("classification", "center", "triplet", "auxiliary")
    assert {f"train_{name}" for name in terms} < trainer.callback_metrics.keys()
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    again = InceptionFusion.load_from_checkpoint(path, weights_only=True).eval()
    assert torch.equal(again.center.centers, model.center.centers)  # type: ignore[union-attr]
    assert again.center.centers.abs().sum() > 0  # type: ignore[union-attr]
    x = batch_of()["waveform"]
    assert torch.equal(again(x), model.eval()(x))
    assert again.protocol["samples_per_class"] == 4


def test_a_resumed_training_is_an_uninterrupted_one(data: SPRSoundDataModule, tmp_path: Path) -> None:
    def train(epochs: int, resume: Path | None = None) -> tuple[InceptionFusion, Trainer]:
        seed_everything(0, verbose=False)
        model = small(schedule="constant", mix=Mixup(0.4, p=0.5), loss=objective(MixedCrossEntropy()))
        trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, **SILENT)
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
        return model, trainer

    whole, _ = train(2)
    _, half = train(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = train(2, tmp_path / "half.ckpt")
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other), name


def test_it_learns_eight_clips() -> None:
    seed_everything(0, verbose=False)
    model, batch = small(), batch_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss, logged = step(model, batch)
        loss.backward()
        optimizer.step()
    assert float(logged["train_classification"]) < 0.1


def test_the_features_can_come_from_the_cache(sprsound_root: Path, tmp_path: Path) -> None:
    """The same training, but for the rounding of the features to half precision."""
    losses = []
    for cached in (False, True):
        seed_everything(0, verbose=False)
        data = SPRSoundDataModule(
            sprsound_root,
            partial=True,
            sample_rate=8000,
            duration=0.5,
            batch_size=16,
            feature_cache=cached,
            cache_dir=tmp_path,
            val_fraction=0.3,
        )
        trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT)
        model = small()
        calls = []
        model.features.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.fit(model, datamodule=data)
        losses.append(float(trainer.callback_metrics["train_loss"]))
        if cached:
            made = len(calls)
            trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT)
            trainer.fit(model, datamodule=data)
            assert len(calls) == made + 1  # of two cycles, to be compared with what is kept
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert len(list((tmp_path / "features").glob("*/meta.json"))) == 1


class Foreign(nn.Module):
    """A front end that does not say how it was built."""

    def forward(self, waveform: Tensor) -> Tensor:
        return waveform.unfold(1, 64, 64)[..., : 2 * BANDS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"waveform_augment": WaveformAugment(8000, gain=(-6, 6))}, "waveform_augment changes the waveforms in every"),
        ({"features": Foreign()}, "what shapes the features of Foreign is not known"),
        (
            {
                "backbone": CNN6(),
                "features": LogMelSpectrogram(8000, normalize="batch_minmax"),
                "loss": objective(size=512),
            },
            "makes the features of a clip depend on the clips beside it",
        ),
    ],
    ids=["augmented", "foreign", "by the batch"],
)
def test_features_that_cannot_be_cached(
    arguments: dict[str, Any], message: str, sprsound_root: Path, tmp_path: Path
) -> None:
    data = SPRSoundDataModule(sprsound_root, partial=True, sample_rate=8000, duration=0.5, feature_cache=True)
    with pytest.raises(ValueError, match=message):
        Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT).fit(small(**arguments), datamodule=data)


def test_every_method_can_use_the_cache(sprsound_root: Path, tmp_path: Path) -> None:
    data = SPRSoundDataModule(
        sprsound_root, partial=True, sample_rate=8000, duration=1.0, feature_cache=True, cache_dir=tmp_path
    )
    model = SoundClassifier(
        CNN6(), classes=data.classes, scoring="sprsound", features=LogMelSpectrogram(8000, 256, 64, 32, f_max=4000)
    )
    trainer = Trainer(max_epochs=1, limit_train_batches=2, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    assert 0 <= scores["test_score"] <= 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": objective(classes=3)}, LabelError, "3 centres for 2 classes"),
        ({"loss": objective(size=7)}, ValueError, "the centres have 7 numbers, the embeddings 10"),
        ({"features": GammatoneSpectrogram(num_bands=BANDS)}, ValueError, r"take \[16, 16\] bins, .* give \[16\]"),
        ({"mix": Mixup(), "loss": CrossEntropy()}, TypeError, "cannot be the loss of this InceptionFusion"),
        ({"mix": Mixup(), "loss": nn.CrossEntropyLoss()}, TypeError, "CrossEntropyLoss cannot take mixed samples"),
    ],
    ids=["classes", "size", "front ends", "loss", "foreign loss"],
)
def test_parts_that_do_not_fit(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(**arguments)


@pytest.mark.parametrize("limit", [None, 2], ids=["whole", "limited"])
def test_a_batch_of_one_is_found_before_training(limit: int | None, sprsound_root: Path, tmp_path: Path) -> None:
    data = SPRSoundDataModule(sprsound_root, partial=True, sample_rate=8000, duration=0.5, batch_size=1)
    trainer = Trainer(max_epochs=1, limit_train_batches=limit, default_root_dir=tmp_path, **SILENT)
    with pytest.raises(ValueError, match="the method needs at least 2"):
        trainer.fit(small(), datamodule=data)


def test_predicting_needs_no_cache(sprsound_root: Path, tmp_path: Path) -> None:
    """It reads waveforms, so that a front end that cannot be cached predicts all the same."""
    data = SPRSoundDataModule(
        sprsound_root, partial=True, sample_rate=8000, duration=0.5, feature_cache=True, cache_dir=tmp_path
    )
    model = small(features=Foreign(), backbone=SpectrogramFusion([branch(), branch()], [BANDS, BANDS], num_features=10))
    trainer = Trainer(default_root_dir=tmp_path, **SILENT)
    probabilities = torch.cat(trainer.predict(model, datamodule=data))  # type: ignore[arg-type]
    assert len(probabilities) == len(data.test_set)
    assert not (tmp_path / "features").exists()


def test_a_foreign_loss_may_have_a_centre_of_its_own() -> None:
    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.center = CenterLoss(2, 10)

        def forward(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(logits, labels) + self.center(embeddings, labels)

    model = small(loss=Theirs())
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in batch_of().items()} for i in range(8)], batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(max_steps=1, enable_checkpointing=False, **SILENT).fit(model, loader)
    assert model.center is None
