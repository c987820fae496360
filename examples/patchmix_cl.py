"""Patch-Mix contrastive learning on a synthetic data set, and a picture of what is mixed.

$ python examples/patchmix_cl.py
"""

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.nn.functional import fold, unfold

from respiro.datamodules import ICBHIDataModule
from respiro.datasets import write_synthetic_icbhi
from respiro.evaluation import evaluate
from respiro.methods import PatchMixCL
from respiro.models import AST
from respiro.transforms import KaldiFbank, PatchMix, SpecAugment

seed_everything(0, verbose=False)
root = write_synthetic_icbhi("runs/synthetic_icbhi", num_patients=12)  # or the folder of ICBHI itself
data = ICBHIDataModule(root, batch_size=16, duration=3.0, drop_last=True)

model = PatchMixCL(
    AST("tiny224", num_mel_bins=64, frames=298, stride=16),  # random weights; load_weights fills them from AudioSet
    features=KaldiFbank(num_mel_bins=64, f_max=2000.0),  # with AST(), KaldiFbank() is the default
    augment=SpecAugment(freq_width=16, time_width=60),
    patch_mix=PatchMix("patch", beta=1.0),  # or "time", "freq", "block"
    optimizer="adamw",
    lr=5e-4,
)
trainer = Trainer(max_epochs=2, logger=False, default_root_dir="runs")
trainer.fit(model, datamodule=data)
print(evaluate(model, data))

# What the transformer sees: PatchMix on 16 by 16 pixels instead of their embeddings.
batch = next(iter(data.train_dataloader()))
x = model.augment.train()(model.features(batch["waveform"]))[:, :288].transpose(1, 2).unsqueeze(1)
pixels = unfold(x, kernel_size=16, stride=16).transpose(1, 2)
mixed = PatchMix("patch")(pixels, grid=(4, 18), generator=torch.Generator().manual_seed(0))
image = fold(mixed.x.transpose(1, 2), output_size=(64, 288), kernel_size=16, stride=16)

first = int((batch["label"] != batch["label"][mixed.index]).nonzero()[0])
partner = int(mixed.index[first])
kept = float(mixed.lam)
names = [data.classes[batch["label"][i]] for i in (first, partner)]
panels = [
    (x[first, 0], f"sample ({names[0]})"),
    (x[partner, 0], f"partner ({names[1]})"),
    (image[first, 0], f"mixed: {kept:.0%} of the sample's patches, {1 - kept:.0%} of the partner's"),
]
figure, axes = plt.subplots(3, 1, figsize=(8, 6), layout="constrained")
for axis, (spectrogram, title) in zip(axes, panels, strict=True):
    axis.imshow(spectrogram, origin="lower", aspect="auto", vmin=float(x.min()), vmax=float(x.max()))
    axis.set(title=title, ylabel="mel bin", xticks=range(0, 289, 32), yticks=range(0, 65, 16))
axes[-1].set_xlabel("frame (10 ms)")
figure.savefig("runs/patchmix.png", dpi=100)
print("the picture: runs/patchmix.png")
