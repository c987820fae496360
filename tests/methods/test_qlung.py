"""QLung: its step as the equations have it, what it is given, its checkpoint, its training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

from respiro.component import Component, Loss
from respiro.datamodules import ICBHIDataModule
from respiro.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    CrossEntropy,
    DualFactorAngularMarginLoss,
    LDAMLoss,
    LogitAdjustedCrossEntropy,
)
from respiro.methods import QLung, SoundClassifier
from respiro.models import AST, CNN6, CosineHead, LinearHead
from respiro.transforms import AudioQuality, KaldiFbank, LogMelSpectrogram, SpecAugment, WaveformAugment

COUNTS = [2063, 1215, 501, 363]
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def small(**arguments: Any) -> QLung:
    torch.manual_seed(0)
    features = LogMelSpectrogram(4000, 256, 128, 16, 50, 2000, mean=0.5, std=0.3)
    return QLung(CNN6(), **({"features": features, "lr": 1e-3} | arguments))


def masks() -> SpecAugment:
    return SpecAugment("LB", freq_width=4, time_width=4, time_warp=0)


def batch_of(size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "waveform": 0.1 * torch.randn(size, 4000, generator=generator),
        "label": torch.arange(size) % 4,
        "length": torch.full((size,), 4000),
        "quality": torch.linspace(0, 1, size),
    }


@pytest.fixture
def data(icbhi_root: Path) -> ICBHIDataModule:
    return ICBHIDataModule(icbhi_root, sample_rate=4000, duration=1.0, batch_size=8, val_fraction=0.3)


def step(model: QLung, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a step and what it logs."""
    logged: dict[str, Tensor] = {}

    def keep(loss: Tensor, labels: Tensor, **terms: Tensor) -> Tensor:
        logged.update(terms)
        return loss

    model.logged = keep  # type: ignore[method-assign]
    return model.train().training_step(batch, 0), {name: term.detach() for name, term in logged.items()}


def embeddings_of(model: QLung, batch: dict[str, Tensor]) -> Tensor:
    """What the head gets in a training step that draws nothing."""
    embeddings: Tensor = model.train().backbone(model.features(batch["waveform"]))
    return embeddings.detach()


def cosines_of(embeddings: Tensor, weight: Tensor) -> list[list[float]]:
    return [[float(x @ w / (x.norm() * w.norm())) for w in weight.detach()] for x in embeddings]


def by_the_equations(cosines: list[list[float]], labels: Tensor, quality: Tensor) -> tuple[float, float]:
    """Equations 1 to 6 with the paper's numbers, sample by sample: cross-entropy and DFAM loss."""
    ce = dfam = 0.0
    for row, label, aqs in zip(cosines, labels.tolist(), quality.tolist(), strict=True):
        ce -= 37 * row[label] - math.log(sum(math.exp(37 * cosine) for cosine in row))
        class_margin = -0.2 / math.log(4) * math.log(COUNTS[label] / sum(COUNTS))
        margin = 0.5 * 0.5 * aqs + 0.5 * class_margin
        moved = [math.cos(math.acos(cosine) + margin) if other == label else cosine for other, cosine in enumerate(row)]
        dfam -= 15 * moved[label] - math.log(sum(math.exp(15 * cosine) for cosine in moved))
    return ce / len(cosines), dfam / len(cosines)


def test_a_step_is_the_papers_sum() -> None:
    model, batch = small(margin=DualFactorAngularMarginLoss(COUNTS)), batch_of()
    loss, logged = step(model, batch)
    cosines = cosines_of(embeddings_of(model, batch), model.head.weight)
    ce, dfam = by_the_equations(cosines, batch["label"], batch["quality"])
    assert float(logged["train_ce"]) == pytest.approx(ce, rel=1e-4)
    assert float(logged["train_margin"]) == pytest.approx(dfam, rel=1e-4)
    assert loss.item() == pytest.approx(ce + 0.4 * dfam, rel=1e-4)


def test_the_paper_without_its_margin_is_the_angular_classifier() -> None:
    model, batch = small(margin_weight=0), batch_of()
    loss, logged = step(model, {name: part for name, part in batch.items() if name != "quality"})
    plain = cross_entropy(model.head(embeddings_of(model, batch)), batch["label"])
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    assert list(logged) == ["train_ce"]


MARGINS: dict[str, Loss] = {
    "arcface": ArcFaceLoss(30.0, 0.2),
    "cosface": CosFaceLoss(30.0, 0.4),
    "adaface": AdaFaceLoss(),
    "ldam": LDAMLoss(COUNTS),
    "dfam": DualFactorAngularMarginLoss(COUNTS),
}


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_alone_is_given_what_it_asks_for(name: str) -> None:
    model, batch = small(margin=MARGINS[name], ce_weight=0, margin_weight=1), batch_of()
    loss, logged = step(model, batch)
    loss.backward()
    assert list(logged) == ["train_margin"]
    assert model.head.weight.grad.abs().sum() > 0
    embeddings = embeddings_of(model, batch)
    more = {"adaface": [embeddings.norm(dim=1)], "dfam": [batch["quality"]]}.get(name, [])
    cosines = torch.tensor(cosines_of(embeddings, model.head.weight))
    expected = MARGINS[name](cosines, batch["label"], *more)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_the_margin_can_share_the_weights_of_a_linear_classifier() -> None:
    model, batch = small(head=LinearHead(512, 4), margin=ArcFaceLoss(15.0, 0.2)), batch_of()
    _, logged = step(model, batch)
    embeddings = embeddings_of(model, batch)
    cosines = torch.tensor(cosines_of(embeddings, model.head.linear.weight))
    assert float(logged["train_margin"]) == pytest.approx(float(model.margin(cosines, batch["label"])), rel=1e-4)
    assert float(logged["train_ce"]) == pytest.approx(float(cross_entropy(model.head(embeddings), batch["label"])))


def test_a_shared_head_drops_the_same_for_both_losses() -> None:
    model, batch = small(head=LinearHead(512, 4, dropout=0.5), margin=ArcFaceLoss(15.0, 0.2)), batch_of()
    dropped: list[Tensor] = []
    model.head.dropout.register_forward_hook(lambda _module, _args, out: dropped.append(out.detach()))  # type: ignore[union-attr,operator]
    _, logged = step(model, batch)
    (kept,) = dropped
    cosines = torch.tensor(cosines_of(kept, model.head.linear.weight))
    assert float(logged["train_margin"]) == pytest.approx(float(model.margin(cosines, batch["label"])), rel=1e-4)
    expected = float(cross_entropy(model.head.linear(kept), batch["label"]))  # type: ignore[union-attr,operator]
    assert float(logged["train_ce"]) == pytest.approx(expected, rel=1e-5)


def test_the_margin_can_have_weights_of_its_own() -> None:
    model, batch = small(margin=ArcFaceLoss(15.0, 0.2), share_weights=False), batch_of()
    loss, logged = step(model, batch)
    loss.backward()
    cosines = torch.tensor(cosines_of(embeddings_of(model, batch), model.margin_head.weight))  # type: ignore[union-attr,arg-type]
    assert float(logged["train_margin"]) == pytest.approx(float(model.margin(cosines, batch["label"])), rel=1e-4)
    assert not torch.equal(model.margin_head.weight, model.head.weight)  # type: ignore[union-attr,arg-type]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_better_sound_has_a_larger_loss() -> None:
    model, batch = small(margin=DualFactorAngularMarginLoss(COUNTS)), batch_of()
    losses = [
        float(step(model, batch | {"quality": torch.full((8,), quality)})[1]["train_margin"])
        for quality in (0.0, 0.5, 1.0)
    ]
    assert losses[0] < losses[1] < losses[2]


def test_prediction_needs_neither_margin_nor_quality() -> None:
    class Refusing(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Tensor:
            raise AssertionError("prediction came here")

    model, x = small(share_weights=False).eval(), batch_of()["waveform"]
    expected = model(x)
    model.margin = model.quality = model.margin_head = Refusing()  # type: ignore[assignment]
    assert torch.equal(model(x), expected)
    assert list(model.predict(x)["prediction"]) == [model.classes[label] for label in expected.argmax(1).tolist()]


def test_the_exported_graph_holds_neither_margin_nor_quality() -> None:
    model = small(share_weights=False, margin=DualFactorAngularMarginLoss(COUNTS)).eval()
    features = model.features(batch_of()["waveform"])
    graph = make_fx(lambda x: model.classify(x))(features)  # what prediction runs, operation by operation
    torch.testing.assert_close(graph(features), model.classify(features))
    kept = [part for node in graph.graph.nodes if node.op == "get_attr" for part in [getattr(graph, node.target)]]
    used = {id(part) for part in [*model.backbone.parameters(), *model.backbone.buffers(), *model.head.parameters()]}
    assert {id(part) for part in kept} <= used
    assert not any("acos" in str(node.target) for node in graph.graph.nodes)


def test_it_trains_and_comes_back(data: ICBHIDataModule, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = small(augment=masks())
    trainer = Trainer(max_epochs=2, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    assert {"train_ce", "train_margin", "train_loss", "val_score"} < trainer.callback_metrics.keys()
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    again = QLung.load_from_checkpoint(path, weights_only=True).eval()
    x = batch_of()["waveform"]
    assert torch.equal(again(x), model.eval()(x))
    # What the training learnt of its data: counts of the train side, percentiles of its RMS.
    assert again.margin.get_extra_state() == data.class_counts
    rms = data.data.store
    train = [float(torch.tensor(rms[row].samples).square().mean().sqrt()) for row in data.split.train]
    expected = torch.quantile(torch.tensor(train), torch.tensor([0.05, 0.95]))
    torch.testing.assert_close(again.quality.rms_range, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(again.quality(x), model.quality(x))
    assert again.protocol["quality"]["init_args"]["entropy"] == "frame-mean"
    assert again.protocol["quality"]["rms_range"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_resumed_training_is_an_uninterrupted_one(data: ICBHIDataModule, tmp_path: Path) -> None:
    def train(epochs: int, resume: Path | None = None) -> tuple[QLung, Trainer]:
        seed_everything(0, verbose=False)
        model = small(
            schedule="constant",
            margin=AdaFaceLoss(momentum=0.5),
            augment=SpecAugment("LB", freq_width=4, time_width=4, time_warp=0),
        )
        trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, **SILENT)
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
        return model, trainer

    whole, _ = train(2)
    _, half = train(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = train(2, tmp_path / "half.ckpt")
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other) or "rms_range" in name, name  # NaN: AdaFace asks for no quality


def test_the_batches_carry_the_quality_of_the_raw_cycles(data: ICBHIDataModule, tmp_path: Path) -> None:
    model = small()
    Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, default_root_dir=tmp_path, **SILENT).fit(
        model, datamodule=data
    )
    batch = next(iter(data.val_dataloader()))
    for row, quality in zip(batch["index"].tolist(), batch["quality"].tolist(), strict=True):
        raw = torch.tensor(data.data.store[row].samples)[None]
        assert quality == pytest.approx(float(model.quality(raw)), abs=1e-5)


def test_quality_is_computed_anew_where_the_waveform_is_augmented(data: ICBHIDataModule) -> None:
    data.prepare_data()
    data.setup("fit")
    quieter = WaveformAugment(4000, gain=(-30, -20))
    model = small(waveform_augment=quieter, margin=DualFactorAngularMarginLoss(COUNTS), margin_weight=1)
    assert model.recompute
    assert not small().recompute
    assert not small(waveform_augment=quieter, margin=ArcFaceLoss()).recompute
    assert not small(waveform_augment=quieter, recompute=False).recompute
    data.add_quality(model.quality)
    batch = next(iter(data.train_dataloader()))
    given = {}
    model.margin.register_forward_pre_hook(lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True)
    step(model, batch)
    torch.manual_seed(0)
    step(model, batch)
    torch.manual_seed(0)
    expected = model.quality(model.train().waveform_augment(batch["waveform"]), batch["length"])
    torch.testing.assert_close(given["quality"], expected)
    assert given["quality"].mean() < batch["quality"].mean()


def test_it_learns_eight_clips() -> None:
    seed_everything(0, verbose=False)
    model, batch = small(margin=DualFactorAngularMarginLoss(COUNTS)), batch_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss, logged = step(model, batch)
        loss.backward()
        optimizer.step()
    assert float(logged["train_ce"]) < 0.1
    # The margin asks for more than being right: its term stays above the bare one.
    assert (model.head.cosines(embeddings_of(model, batch)).argmax(1) == batch["label"]).all()


def test_it_trains_a_transformer_in_half_precision() -> None:
    ast = AST("tiny224", num_mel_bins=32, frames=98, stride=16)
    del ast.v.blocks[2:]
    model = QLung(ast, features=KaldiFbank(num_mel_bins=32), margin=DualFactorAngularMarginLoss(COUNTS))
    batch = batch_of() | {"waveform": torch.randn(8, 16000)}
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = step(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_quality_is_kept_with_cached_features(icbhi_root: Path, tmp_path: Path) -> None:
    data = ICBHIDataModule(
        icbhi_root, sample_rate=4000, duration=1.0, batch_size=8, feature_cache=True, cache_dir=tmp_path
    )
    trainer = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, default_root_dir=tmp_path, **SILENT)
    trainer.fit(small(), datamodule=data)
    sample = data.train_set[0]
    assert 0 <= sample["quality"] <= 1
    assert "features" in sample


def test_a_classifier_takes_the_logit_adjusted_loss(data: ICBHIDataModule, tmp_path: Path) -> None:
    """The one of the family that is on logits, and so needs no method of its own."""
    loss = LogitAdjustedCrossEntropy()
    model = SoundClassifier(CNN6(), features=small().features, loss=loss)
    trainer = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, default_root_dir=tmp_path, **SILENT)
    trainer.fit(model, datamodule=data)
    assert loss.get_extra_state() == data.class_counts


class NoAngle(Component):
    """A head without cosines."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings[:, :4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ce_weight": -1.0}, ValueError, "must not be negative, nor both 0, got -1.0 and 0.4"),
        ({"ce_weight": 0, "margin_weight": 0}, ValueError, "nor both 0"),
        ({"margin_weight": math.nan}, ValueError, "must not be negative, nor both 0"),
        ({"margin": CrossEntropy()}, TypeError, r"CrossEntropy takes \(logits, labels\) and cannot be the margin"),
        ({"loss": ArcFaceLoss()}, TypeError, r"ArcFaceLoss takes \(cosines, labels\) and cannot be the loss"),
        ({"head": NoAngle()}, TypeError, r"NoAngle has no logits_and_cosines\(embeddings\)"),
        ({"ce_weight": 0, "share_weights": False}, ValueError, "both losses are needed, .*; got ce_weight 0"),
        ({"margin_weight": 0, "share_weights": False}, ValueError, "both losses are needed"),
        ({"ce_weight": 0, "head": LinearHead(512, 4)}, ValueError, "nothing trains the bias of LinearHead"),
        ({"head": CosineHead(512, 3)}, ValueError, "the head gives 3 logits for 4 classes"),
    ],
    ids=[
        "negative",
        "both 0",
        "nan",
        "on logits",
        "on cosines",
        "no cosines",
        "head",
        "margin head",
        "bias",
        "other classes",
    ],
)
def test_parts_that_do_not_fit(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(**arguments)


def test_another_head_will_do_beside_weights_of_its_own() -> None:
    model, batch = small(head=NoAngle(), share_weights=False, margin=ArcFaceLoss()), batch_of()
    loss, _ = step(model, batch)
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quality": None}, ValueError, "the batches have no 'quality', which the margin asks for"),
        ({"quality": torch.full((8,), math.nan)}, ValueError, "NaN means that it was not computed: call"),
        ({}, RuntimeError, "has no class counts yet"),
    ],
    ids=["no quality", "not computed", "no counts"],
)
def test_a_loop_of_ones_own_is_told_what_is_missing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    counts = None if error is RuntimeError else COUNTS
    batch = {name: part for name, part in (batch_of() | change).items() if part is not None}
    with pytest.raises(error, match=message):
        step(small(margin=DualFactorAngularMarginLoss(counts)), batch)


def test_what_does_not_fit_is_said_before_any_quality_is_computed(
    data: ICBHIDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "add_quality", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match="the data set has 4000 Hz, the features expect 16000 Hz"):
        Trainer(max_epochs=1, **SILENT).fit(QLung(CNN6(), features=KaldiFbank()), datamodule=data)


def test_the_quality_of_another_sampling_rate_is_refused(data: ICBHIDataModule, tmp_path: Path) -> None:
    model = small(quality=AudioQuality(16000))
    with pytest.raises(ValueError, match="16000"):
        Trainer(max_epochs=1, default_root_dir=tmp_path, **SILENT).fit(model, datamodule=data)
