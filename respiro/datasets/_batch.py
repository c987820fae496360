"""What one batch of a data set holds."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

__all__ = ["CODED", "Batch", "check_label_name"]

#: Metadata columns that every sample carries as an integer, -1 where unknown.
CODED = ("patient", "device", "location", "sex", "age_group")


class Batch(TypedDict):
    """One collated batch of ``B`` cycles, each fitted to ``S`` samples.

    Labels of :meth:`RespiratoryDataset.add_labels` are further keys: (B,) int64, -1 = unknown.
    """

    waveform: Tensor  #: (B, S) float32 in [-1, 1], but for what resampling adds to a clipped recording
    features: NotRequired[Tensor]  #: (B, T, F) float16, only after :meth:`RespiratoryDataset.cache_features`
    label: Tensor  #: (B,) int64
    index: Tensor  #: (B,) int64, row label in the cycles table
    length: Tensor  #: (B,) int64, samples before padding
    patient: Tensor  #: (B,) int64; like the other metadata, -1 = unknown
    device: Tensor
    location: Tensor
    sex: Tensor
    age_group: Tensor
    quality: Tensor  #: (B,) float32, NaN = not computed


def check_label_name(name: str) -> None:
    """Raise a ``ValueError`` for a name that would hide a key of :class:`Batch`."""
    if name in Batch.__annotations__:
        raise ValueError(f"labels cannot be named {name!r}, which every batch has already; choose another name")
