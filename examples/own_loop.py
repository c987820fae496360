"""Use only parts of respiro (data set, features, loss, metric) in a plain PyTorch loop.

$ python examples/own_loop.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from respiro.datasets import ICBHI, write_synthetic_icbhi
from respiro.losses import CrossEntropy
from respiro.metrics import icbhi_metrics
from respiro.splits import split_cycles
from respiro.transforms import LogMelSpectrogram

torch.manual_seed(0)
root = write_synthetic_icbhi("runs/synthetic_icbhi")
data = ICBHI(root, split="all", duration=4.0)
split = split_cycles(data.cycles, "official", val_fraction=0.2)  # by patient
train, val = data.subset(split.train), data.subset(split.val)

features = LogMelSpectrogram()
network = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 4))
network(features(train[0]["waveform"][None]))  # gives the lazy layer its shape
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
loss = CrossEntropy(weight="balanced")
loss.use_class_counts(train.class_counts)
scores = icbhi_metrics(num_classes=4)

for _ in range(2):
    for batch in DataLoader(train, batch_size=32, shuffle=True):
        value = loss(network(features(batch["waveform"])), batch["label"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    scores.reset()
    with torch.inference_mode():
        for batch in DataLoader(val, batch_size=32):
            scores.update(network(features(batch["waveform"])), batch["label"])
    print({name: round(value.item(), 3) for name, value in scores.compute().items()})
