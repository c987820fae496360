"""Train and score a small network in under a minute, offline.

$ python examples/quickstart.py
"""

from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from respiro.datamodules import ICBHIDataModule
from respiro.datasets import write_synthetic_icbhi
from respiro.evaluation import evaluate
from respiro.methods import SoundClassifier
from respiro.models import CNN6

seed_everything(0)
root = write_synthetic_icbhi("runs/synthetic_icbhi")  # the real file layout; point root at ICBHI itself instead
data = ICBHIDataModule(root, batch_size=16, duration=4.0)
model = SoundClassifier(CNN6())

best = ModelCheckpoint("runs/quickstart", monitor="val_score", mode="max")
trainer = Trainer(max_epochs=3, callbacks=[best], logger=False)
trainer.fit(model, datamodule=data)

model = SoundClassifier.load_from_checkpoint(best.best_model_path, weights_only=True)
report = evaluate(model, data, output_dir="runs/quickstart/report")
print(report)

recording = next(Path(root).rglob("*.wav"))
print(model.predict(recording))
