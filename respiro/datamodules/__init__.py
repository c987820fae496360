"""LightningDataModules that carry their protocol record."""

from respiro.datamodules.cross import CrossDatasetDataModule
from respiro.datamodules.icbhi import ICBHIDataModule
from respiro.datamodules.sprsound import SPRSoundDataModule

__all__ = [
    "CrossDatasetDataModule",
    "ICBHIDataModule",
    "SPRSoundDataModule",
]
