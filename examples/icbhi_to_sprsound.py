"""Train on ICBHI, test on ICBHI and on SPRSound: quality-adaptive margins, what can be measured, and the floor.

$ python examples/icbhi_to_sprsound.py [ICBHI SPRSOUND]

The two are the folders of the data sets; without them, synthetic ones are written to runs/ and used.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything

from respiro.datamodules import CrossDatasetDataModule, ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import write_synthetic_icbhi, write_synthetic_sprsound
from respiro.evaluation import evaluate, plot_quality
from respiro.methods import QLung
from respiro.models import CNN6
from respiro.transforms import LogMelSpectrogram

parser = argparse.ArgumentParser(description="Train on ICBHI, test on ICBHI and on SPRSound.")
parser.add_argument("roots", nargs="*", help="folders of ICBHI and of SPRSound (default: synthetic data sets)")
roots = parser.parse_args().roots or (
    write_synthetic_icbhi("runs/synthetic_icbhi", num_patients=16),
    write_synthetic_sprsound("runs/synthetic_sprsound"),
)

seed_everything(0, verbose=False)
icbhi = ICBHIDataModule(roots[0])
children = SPRSoundDataModule(roots[1], test_side="inter", partial=True)
data = CrossDatasetDataModule(
    train=icbhi,
    test=[icbhi, children],
    label_map="qlung",  # rhonchi and stridor count as wheeze
    sample_rate=4000,
    band=(50, 2000),  # what recordings of every device have
    duration=2.0,
    batch_size=16,
)
print(data.audit())

features = LogMelSpectrogram(sample_rate=4000, n_fft=256, hop_length=128, n_mels=32, f_max=2000)
model = QLung(CNN6(), features=features, lr=1e-3)
# Two epochs show that it runs; on the synthetic data they are too few steps to learn much.
trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False)
trainer.fit(model, datamodule=data)
print(evaluate(model, data))

plot_quality(data.train_set.cycles).savefig("runs/quality.png", dpi=100)
print("quality by device and class: runs/quality.png")
