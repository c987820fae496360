"""Sides of a data set, and what they share."""

from respiro.splits.audit import audit_leakage
from respiro.splits.split import Split, patient_folds, split_cycles

__all__ = [
    "Split",
    "audit_leakage",
    "patient_folds",
    "split_cycles",
]
