"""An Inception-residual network on two spectrograms of SPRSound, and a picture of what these show.

$ python examples/inception_fusion.py [ROOT]

ROOT is the folder of SPRSound; without it, a synthetic data set is written to runs/ and used.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure

from respiro.datamodules import SPRSoundDataModule
from respiro.datasets import write_synthetic_sprsound
from respiro.evaluation import evaluate
from respiro.losses import CenterLoss, MixedCrossEntropy, MultiObjectiveLoss, TripletLoss
from respiro.methods import InceptionFusion
from respiro.models import InceptionResidual, SpectrogramFusion
from respiro.transforms import GammatoneSpectrogram, MorletScalogram, SpecAugment, StackedFeatures


def draw(sounds: dict[str, np.ndarray]) -> Figure:
    """Draw both spectrograms of each sound ``(S,)`` at 8 kHz, with a frame every 5 ms."""
    fronts = {
        "Gammatone": (GammatoneSpectrogram(hop_length=40, normalize="none"), 10),  # log energy
        "wavelet": (MorletScalogram(hop_length=40, normalize="none"), 20),  # log amplitude
    }
    figure, axes = plt.subplots(len(sounds), 2, figsize=(9, 3 * len(sounds)), layout="constrained", squeeze=False)
    for row, (sound, waveform) in zip(axes, sounds.items(), strict=True):
        for axis, (name, (front, factor)) in zip(row, fronts.items(), strict=True):
            decibels = factor / np.log(10) * front(torch.from_numpy(waveform)[None])[0].numpy().T
            image = axis.imshow(
                decibels - decibels.max(),
                origin="lower",
                aspect="auto",
                vmin=-45,
                extent=(-0.5 * 0.005, (decibels.shape[1] - 0.5) * 0.005, -0.5, len(decibels) - 0.5),  # s, bins
            )
            hertz = [frequency for frequency in (50, 100, 200, 400, 800, 1600, 3200) if frequency <= front.centres[-1]]
            axis.set_yticks(np.interp(hertz, front.centres, range(len(front.centres))), hertz)
            axis.set(title=f"{sound}, {name}", xlabel="s", ylabel="Hz")
        figure.colorbar(image, ax=row, label="dB, 0 at the maximum")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An Inception-residual network on two spectrograms of SPRSound.")
    parser.add_argument("root", nargs="?", help="folder of SPRSound (default: a synthetic data set)")
    root = parser.parse_args().root or write_synthetic_sprsound("runs/synthetic_sprsound")

    seed_everything(0, verbose=False)
    data = SPRSoundDataModule(
        root,
        task="1-2",
        sample_rate=8000,
        duration=2.0,
        fade="none",
        partial=True,
        batch_size=28,
        samples_per_class=4,  # the triplet loss needs several samples of a class
        feature_cache=True,  # the spectrograms of a cycle are computed once
    )
    bands = 32
    features = StackedFeatures([GammatoneSpectrogram(num_bands=bands), MorletScalogram(num_scales=bands)])
    branches = [InceptionResidual((8, 16, 32, 64), num_features=64, num_heads=4) for _ in features.bins]
    model = InceptionFusion(
        SpectrogramFusion(branches, features.bins, combination="linear", num_features=64),
        classes=data.classes,
        features=features,
        augment=SpecAugment("icbhi_sup", freq_width=4, time_width=12),
        loss=MultiObjectiveLoss(MixedCrossEntropy(), CenterLoss(len(data.classes), 64), TripletLoss()),
        scoring=data.scoring,
    )
    # Two epochs show that it runs; on the synthetic data they are too few steps to learn anything.
    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, datamodule=data)
    print({name: f"{value:.3f}" for name, value in trainer.callback_metrics.items() if name.startswith("train_")})
    print(evaluate(model, data))

    loudest = {"wheeze": np.zeros(1), "fine crackle": np.zeros(1)}
    for row, name in enumerate(data.train_set.cycles["class"]):
        waveform = data.train_set.waveform(row)
        if name in loudest and abs(waveform).max() > abs(loudest[name]).max():
            loudest[name] = waveform
    draw(loudest).savefig("runs/spectrograms.png", dpi=100)
    print("the picture: runs/spectrograms.png")
