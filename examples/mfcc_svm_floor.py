"""The floor for SPRSound: what mean MFCCs and a support vector machine score on every task and test set.

$ python examples/mfcc_svm_floor.py [ROOT]

ROOT is the folder of SPRSound; without it, a synthetic data set is written to runs/ and used.
"""

import argparse
import warnings

import librosa
import numpy as np
import pandas as pd
import torch
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from respiro.datasets import SPRSound, write_synthetic_sprsound
from respiro.metrics import sprsound_metrics, sprsound_total

MODELS = {
    "poly, unscaled": OneVsRestClassifier(SVC(kernel="poly", C=2)),  # the starter code of the challenge
    "rbf, balanced": make_pipeline(StandardScaler(), SVC(kernel="rbf", C=2, class_weight="balanced")),
}
TASKS = ("1-1", "1-2", "2-1", "2-2")
SETS = {"inter": ["inter"], "intra": ["intra"], "both": ["inter", "intra"]}
COLUMNS = {"score": "Score", "sensitivity": "Se", "specificity": "Sp", "average_score": "AS", "harmonic_score": "HS"}


def mean_mfccs(waveform: np.ndarray) -> np.ndarray:
    """Average 40 MFCCs over time: ``(S,)`` to ``(40,)``. The scale is that of the 16-bit files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "n_fft=.* is too large")  # short events: librosa pads them with zeros
        return librosa.feature.mfcc(y=waveform * 2.0**15, sr=8000, n_mfcc=40).mean(axis=1)


def features(data: SPRSound) -> np.ndarray:
    return np.stack([mean_mfccs(data.waveform(row)) for row in range(len(data))])


def score(cycles: pd.DataFrame, predicted: np.ndarray, task: str, splits: list[str]) -> dict[str, float]:
    test = cycles["split"].isin(splits).to_numpy()
    target = cycles["label"].to_numpy()[test]
    values = sprsound_metrics(task)(torch.from_numpy(predicted[test]), torch.from_numpy(target))
    return {name: value.item() for name, value in values.items()}


def floor(data: dict[str, SPRSound]) -> pd.DataFrame:
    """Score each model on each test set and task; the total weighs the four tasks."""
    # Tasks on the same unit, events (1-x) or recordings (2-x), differ only in their labels.
    inputs = {"1": features(data["1-1"]), "2": features(data["2-1"])}
    rows = {}
    for name, model in MODELS.items():
        for task in TASKS:
            x, cycles = inputs[task[0]], data[task].cycles
            train = (cycles["split"] == "train").to_numpy()
            predicted = model.fit(x[train], cycles["label"][train]).predict(x)
            for part, splits in SETS.items():
                rows[name, part, task] = score(cycles, predicted, task, splits)
        for part in SETS:
            total = sprsound_total({task: rows[name, part, task]["score"] for task in TASKS})
            rows[name, part, "total"] = {"score": total}
    order = pd.MultiIndex.from_product([MODELS, SETS, [*TASKS, "total"]], names=["model", "set", "task"])
    return pd.DataFrame.from_dict(rows, orient="index").reindex(order)[list(COLUMNS)].rename(columns=COLUMNS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The floor for SPRSound: mean MFCCs and a support vector machine.")
    parser.add_argument("root", nargs="?", help="folder of SPRSound (default: a synthetic data set)")
    root = parser.parse_args().root or write_synthetic_sprsound("runs/synthetic_sprsound")
    data = {task: SPRSound(root, "all", task, sample_rate=8000, fade="none", partial=True) for task in TASKS}
    print((100 * floor(data)).to_string(float_format="{:.1f}".format, na_rep=""))
    print("calling everything normal: Score 25, Se 0, Sp 100, AS 50, HS 0")
    if data["1-1"].partial:
        print("recordings of the release are missing: these numbers do not compare with published ones")
