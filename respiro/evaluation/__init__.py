"""From a trained model to a score with its uncertainty and its protocol."""

from respiro.evaluation.embeddings import plot_embeddings
from respiro.evaluation.evaluate import Evaluation, evaluate
from respiro.evaluation.quality import plot_quality
from respiro.evaluation.statistics import bootstrap_by_patient, compare_paired

__all__ = [
    "Evaluation",
    "bootstrap_by_patient",
    "compare_paired",
    "evaluate",
    "plot_embeddings",
    "plot_quality",
]
