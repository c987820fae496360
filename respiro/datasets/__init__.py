"""Data sets: files on disk to two pandas tables and fixed-length waveforms."""

from respiro.datasets.base import RespiratoryDataset
from respiro.datasets.icbhi import ICBHI
from respiro.datasets.metadata import MetadataLabels, metadata_labels
from respiro.datasets.sprsound import SPRSound
from respiro.datasets.synthetic import write_synthetic_icbhi, write_synthetic_sprsound

__all__ = [
    "ICBHI",
    "MetadataLabels",
    "RespiratoryDataset",
    "SPRSound",
    "metadata_labels",
    "write_synthetic_icbhi",
    "write_synthetic_sprsound",
]
