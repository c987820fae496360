"""Supervised contrastive learning on class and metadata, on a synthetic data set, and a picture of the embeddings.

$ python examples/scl_metadata.py
"""

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from respiro.datamodules import ICBHIDataModule
from respiro.datasets import write_synthetic_icbhi
from respiro.evaluation import evaluate, plot_embeddings
from respiro.losses import MultiSupConLoss
from respiro.methods import MSCL, LinearProbe
from respiro.models import CNN6
from respiro.transforms import SpecAugment

seed_everything(0, verbose=False)
root = write_synthetic_icbhi("runs/synthetic_icbhi", num_patients=16)  # or the folder of ICBHI itself
data = ICBHIDataModule(root, batch_size=16, duration=2.0, metadata={"sex_age": ["sex", "age_group"]})

# Both stages in one training: before each validation, a classifier is fitted to the embeddings of the train side.
model = MSCL(
    CNN6(),  # random weights; load_weights fills them from AudioSet
    augment=SpecAugment("icbhi_sup", freq_width=8, time_width=16),  # short masks for short clips
    loss=MultiSupConLoss({"class": 0.75, "sex_age": 0.25}),
    lr=3e-4,
)
best = ModelCheckpoint("runs/mscl", monitor="val_score", mode="max", enable_version_counter=False)
trainer = Trainer(max_epochs=6, check_val_every_n_epoch=2, callbacks=[best], logger=False, enable_model_summary=False)
trainer.fit(model, datamodule=data)
model = MSCL.load_from_checkpoint(best.best_model_path, weights_only=True)
print(evaluate(model, data))

# The second stage again, by itself: another classifier on the same encoder.
probe = LinearProbe(model.backbone, features=model.features, probe="knn", neighbors=5)
trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
trainer.fit(probe, datamodule=data)
print(f"5 nearest neighbours: Score {100 * evaluate(probe, data).metrics['score']:.2f}")

figure = plot_embeddings(model.embed(data.test_set), data.test_set.cycles, ("class", "patient", "device"))
figure.savefig("runs/embeddings.png", dpi=100)
print("the picture: runs/embeddings.png")
