"""The same on a GPU as on the CPU, and nothing that makes the CPU wait for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from respiro.datamodules import ICBHIDataModule
from respiro.evaluation import evaluate
from respiro.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CenterLoss,
    CosFaceLoss,
    CrossEntropy,
    DualFactorAngularMarginLoss,
    HybridSupConLoss,
    LDAMLoss,
    LogitAdjustedCrossEntropy,
    MixedCrossEntropy,
    MultiObjectiveLoss,
    MultiSupConLoss,
    NTXentLoss,
    PatchMixContrastiveLoss,
    SupConLoss,
    TripletLoss,
)
from respiro.methods import MSCL, SCL, HybridSCL, InceptionFusion, PatchMixCE, PatchMixCL, SimCLR, SoundClassifier
from respiro.models import AST, CNN6, CosineHead, InceptionResidual, SpectrogramFusion
from respiro.transforms import (
    AudioQuality,
    CutMix,
    GammatoneSpectrogram,
    KaldiFbank,
    LogMelSpectrogram,
    Mixup,
    MorletScalogram,
    PatchMix,
    SpecAugment,
    StackedFeatures,
    WaveformAugment,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CONTRASTIVE: dict[str, Callable[..., SoundClassifier]] = {
    "simclr": SimCLR,
    "scl": lambda *parts, **arguments: SCL(*parts, loss=SupConLoss(memory=20), view_forward="concat", **arguments),
    "mscl": MSCL,
    "hybrid": lambda *parts, **arguments: HybridSCL(*parts, loss=HybridSupConLoss(weight=[1, 2, 3, 4]), **arguments),
}
METHODS = ["patchmix-ce", "patchmix-cl", "mixup", "cutmix", *CONTRASTIVE, "inception"]


def method(name: str, **arguments: Any) -> SoundClassifier:
    """A small model of each kind, with the same weights whenever it is built."""
    torch.manual_seed(0)
    ast = AST("tiny224", num_mel_bins=32, frames=98, stride=16)
    del ast.v.blocks[3:]  # enough to tell devices apart, and quick to compile
    arguments = {"features": KaldiFbank(num_mel_bins=32), **arguments}
    if name == "patchmix-ce":
        return PatchMixCE(ast, patch_mix=PatchMix("block", 0.5, per_sample=True), **arguments)
    if name == "patchmix-cl":
        contrastive = PatchMixContrastiveLoss(negatives="different-label")
        return PatchMixCL(ast, contrastive=contrastive, target="project_flow", **arguments)
    if name in CONTRASTIVE:
        return CONTRASTIVE[name](ast, **({"augment": SpecAugment(p=0.0, freq_width=8, time_width=30)} | arguments))
    if name == "inception":
        branches = [InceptionResidual((8, 16), 12, 2, (0.0, 0.0), embedding_dropout=0.0) for _ in range(2)]
        front_ends = [GammatoneSpectrogram(16000, 16), MorletScalogram(16000, 16, f_min=100)]
        loss = MultiObjectiveLoss(MixedCrossEntropy([0.5, 1.0, 1.5, 2.0]), CenterLoss(4, 10), TripletLoss())
        arguments |= {"features": StackedFeatures(front_ends), "loss": loss, "mix": Mixup(0.4, p=0.5)}
        return InceptionFusion(SpectrogramFusion(branches, [16, 16], "gated", num_features=10), **arguments)
    mix = Mixup(0.4) if name == "mixup" else CutMix(per_sample=True)
    return SoundClassifier(ast, mix=mix, loss=MixedCrossEntropy([0.5, 1.0, 1.5, 2.0]), **arguments)


def augmentations() -> dict[str, Any]:
    return {
        "waveform_augment": WaveformAugment(
            16000,
            gain=(-6, 6),
            snr=(10, 40),
            shift=0.5,
            speed=(0.9, 1.1),
            band=((20, 150), (1000, 4000)),
            device_response=6.0,
            noise_color=1.0,
        ),
        "augment": SpecAugment("LB", freq_width=8, time_width=30, time_warp=20),
    }


def noise(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = {"waveform": torch.randn(8, 16000, generator=generator), "label": torch.arange(8) % 4}
    batch["sex_age"] = torch.arange(8) // 3 - 1  # the first unknown
    return {name: part.to(device) for name, part in batch.items()}


def step(model: SoundClassifier, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of a training step outside of a trainer, gradients computed."""
    model.logged = lambda loss, labels, **terms: loss  # type: ignore[method-assign]
    loss = model.train().training_step(batch, 0)
    loss.backward()
    return loss.detach()


def test_logits_are_those_of_the_cpu() -> None:
    waveform = torch.randn(4, 32000, generator=torch.Generator().manual_seed(0))
    model = SoundClassifier(CNN6()).eval()
    with torch.inference_mode():
        expected = model(waveform)
        found = model.cuda()(waveform.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_training_step_is_that_of_the_cpu(name: str) -> None:
    """In double precision, where neither TF32 nor the order of a sum hides a wrong draw."""
    models, losses = {}, {}
    for device in ("cpu", "cuda"):
        models[device] = method(name).double().to(device)
        batch = noise(device)
        torch.manual_seed(11)  # mixing draws on the CPU
        losses[device] = step(models[device], batch | {"waveform": batch["waveform"].double()})
    torch.testing.assert_close(losses["cuda"].cpu(), losses["cpu"], rtol=1e-6, atol=0)
    for (part, expected), found in zip(models["cpu"].named_parameters(), models["cuda"].parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None
        else:
            torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-5, atol=1e-7, msg=part)  # type: ignore[union-attr]


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


def train_loss(model: SoundClassifier, root: Path, **options: Any) -> Tensor:
    """Return the mean loss of a few steps of training."""
    seed_everything(0, verbose=False)
    data = ICBHIDataModule(root, batch_size=8, duration=1.0, drop_last=True)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1}
    trainer = Trainer(accelerator="gpu", devices=1, **limits, **silent, **options)  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data)
    return trainer.callback_metrics["train_loss"]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_has_nearly_the_loss(icbhi_root: Path, name: str, precision: str) -> None:
    full, half = (
        # Steps so small that it does not matter if the first ones overflow and are left out.
        train_loss(method(name, lr=1e-6, **augmentations()), icbhi_root, precision=used)
        for used in ("32-true", precision)
    )
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.0)


def test_compiled_training_has_the_same_loss(icbhi_root: Path) -> None:
    plain, compiled = (
        train_loss(method("patchmix-cl", compile=wanted, **augmentations()), icbhi_root) for wanted in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=0.0)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Let torch raise where the CPU would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed() -> None:
    value = torch.ones(1, device="cuda")
    with without_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        value.item()


def fitted_quality(**options: Any) -> AudioQuality:
    quality = AudioQuality(**options)
    quality.fit(torch.tensor([0.5, 1.5]))
    return quality


#: How every part of a training step is built, and what it is given.
PARTS: dict[str, tuple[Callable[..., torch.nn.Module], str]] = {
    "kaldi-fbank": (KaldiFbank, "waveform"),
    "log-mel": (LogMelSpectrogram, "waveform"),
    "gammatone": (lambda: GammatoneSpectrogram(16000, 16), "waveform"),
    "morlet": (lambda: MorletScalogram(16000, 16, f_min=100), "waveform"),
    "quality": (lambda: AudioQuality(rms="raw"), "waveform length"),
    "quality-fitted": (lambda: fitted_quality(entropy="mean-psd", band=(50, 2000)), "waveform length"),
    "waveform-augment": (lambda: augmentations()["waveform_augment"], "waveform"),
    "spec-augment": (lambda: augmentations()["augment"], "features"),
    "spec-augment-zero": (lambda: SpecAugment(freq_width=8, time_width=30, fill="zero"), "features"),
    "spec-augment-roll": (lambda: SpecAugment(freq_width=8, time_width=30, roll=True), "features"),
    "mixup": (Mixup, "features"),
    "mixup-some": (lambda: Mixup(p=0.5), "features"),
    "cutmix": (CutMix, "features"),
    "patch-mix-patch": (PatchMix, "tokens grid"),
    "patch-mix-time": (lambda: PatchMix("time", per_sample=True), "tokens grid"),
    "patch-mix-freq": (lambda: PatchMix("freq"), "tokens grid"),
    "patch-mix-block": (lambda: PatchMix("block", per_sample=True), "tokens grid"),
    "cross-entropy": (lambda: CrossEntropy([1.0, 2.0, 3.0, 4.0]), "logits label"),
    "mixed-cross-entropy": (MixedCrossEntropy, "logits label index lam"),
    "contrastive": (PatchMixContrastiveLoss, "logits logits index lam"),
    "contrastive-different-label": (
        lambda: PatchMixContrastiveLoss(negatives="different-label"),
        "logits logits index lam label",
    ),
    "sup-con": (SupConLoss, "logits label"),
    "sup-con-negatives": (lambda: SupConLoss(denominator="negatives"), "logits label"),
    "sup-con-memory": (lambda: SupConLoss(memory=20), "logits label"),
    "nt-xent": (NTXentLoss, "logits logits"),
    "multi-sup-con": (lambda: MultiSupConLoss({"class": 0.5, "sex": 0.5}), "by_task labels_by_task"),
    "center": (lambda: CenterLoss(4, 4), "logits label"),
    "triplet": (TripletLoss, "logits label"),
    "triplet-semihard": (lambda: TripletLoss(mining="semihard"), "logits label"),
    "multi-objective": (
        lambda: MultiObjectiveLoss(CrossEntropy(), CenterLoss(4, 4), TripletLoss(), weighting="uncertainty"),
        "logits logits label",
    ),
    "cosine-head": (lambda: CosineHead(4, 4), "logits"),
    "arc-face": (ArcFaceLoss, "cosines label"),
    "arc-face-clip": (lambda: ArcFaceLoss(beyond="clip"), "cosines label"),
    "cos-face": (CosFaceLoss, "cosines label"),
    "ada-face": (AdaFaceLoss, "cosines label lam"),
    "ldam": (lambda: LDAMLoss([4, 3, 2, 1]), "cosines label"),
    "logit-adjusted": (lambda: LogitAdjustedCrossEntropy([4, 3, 2, 1]), "logits label"),
    "dual-factor": (lambda: DualFactorAngularMarginLoss([4, 3, 2, 1]), "cosines label lam"),
    "hybrid-sup-con": (lambda: HybridSupConLoss(weight=[1.0, 2.0, 3.0, 4.0]), "logits logits label"),
}


@pytest.mark.parametrize(("build", "names"), PARTS.values(), ids=PARTS.keys())
def test_no_part_waits_for_the_gpu(build: Callable[..., torch.nn.Module], names: str) -> None:
    part = build().cuda()
    given: dict[str, Any] = {
        **noise("cuda"),
        "length": torch.arange(1, 9, device="cuda") * 2000,
        "features": torch.randn(8, 98, 32, device="cuda"),
        "tokens": torch.randn(8, 12, 4, device="cuda"),
        "grid": (2, 6),
        "logits": torch.randn(8, 4, device="cuda"),
        "cosines": torch.rand(8, 4, device="cuda") * 2 - 1,
        "index": torch.randperm(8, device="cuda"),
        "lam": torch.rand(8, device="cuda"),
    }
    given["by_task"] = {"class": given["logits"], "sex": given["logits"]}
    given["labels_by_task"] = {"class": given["label"], "sex": given["label"] // 2}
    arguments = [given[name] for name in names.split()]
    expected = part(*arguments)  # the first time, libraries are loaded and plans are made
    with without_waiting():
        found = part(*arguments)
    assert type(found) is type(expected)


@pytest.mark.parametrize("name", METHODS)
def test_no_training_step_waits_for_the_gpu(name: str) -> None:
    model, batch = method(name, **augmentations()).cuda(), noise("cuda")
    optimizer = torch.optim.Adam(model.parameters())

    def work() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(model, batch)
        optimizer.step()
        return loss

    work()
    with without_waiting():
        loss = work()
    assert loss.isfinite()
