"""A model's output for every cycle of a data set, joined with the cycles table."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from respiro.component import eval_mode
from respiro.errors import LabelError

__all__ = ["predict"]


def predict(model: nn.Module, data: Any, classes: tuple[str, ...], batch_size: int, num_workers: int) -> pd.DataFrame:
    """Return one row for each row of ``data.cycles``, with the predictions beside the metadata.

    The loader is made here: one that belongs to a trainer gives each of several processes only a part.

    Raises:
        LabelError: If the model does not give one logit for each class.
        ValueError: If a logit is not finite, or a cycle came twice or not at all.
    """
    index, logits = _run(model, DataLoader(data, batch_size, shuffle=False, num_workers=num_workers), classes)
    return _join(data.cycles, index, logits, classes)


def _run(model: nn.Module, loader: DataLoader[Any], classes: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Return row labels ``(N,)`` and logits ``(N, C)`` in the order in which the cycles came."""
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    index, logits = [], []
    with eval_mode(model), torch.inference_mode():
        for batch in loader:
            output = model(batch["waveform"].to(device))
            if output.shape != (len(batch["index"]), len(classes)):
                raise LabelError(
                    f"the model gives an output of shape {tuple(output.shape)} for {len(batch['index'])} cycles of a "
                    f"data set with {len(classes)} classes {list(classes)}; expected one logit for each class"
                )
            index.append(batch["index"].cpu())
            logits.append(output.float().cpu())
    if not index:
        raise ValueError("there is no cycle to evaluate on: this side of the data set is empty")
    return torch.cat(index).numpy(), torch.cat(logits)


def _join(cycles: pd.DataFrame, index: npt.NDArray[np.int64], logits: Tensor, classes: tuple[str, ...]) -> pd.DataFrame:
    """Join the model's output with the cycles table, in the table's order."""
    came = pd.Index(index)
    if not came.is_unique or len(came) != len(cycles) or not came.isin(cycles.index).all():
        raise ValueError(
            f"the data set gave {len(came)} cycles, {came.nunique()} different ones, of a table of {len(cycles)}; "
            f"every row label of its cycles table must come exactly once as 'index' of a sample"
        )
    order = came.get_indexer(cycles.index)
    logits = logits[torch.from_numpy(order)]
    broken = ~logits.isfinite().all(1).numpy()
    if broken.any():
        first = cycles.iloc[int(np.flatnonzero(broken)[0])]
        raise ValueError(
            f"the model gave logits that are not finite for {broken.sum()} of {len(cycles)} cycles (first: recording "
            f"{first['recording']!r}, cycle {first['cycle']}); has training diverged?"
        )
    names = np.array(classes, dtype=object)
    labels, predicted = cycles["label"].to_numpy("int64"), logits.argmax(1).numpy()
    table = cycles[["recording", "cycle", "start", "end"]].rename_axis("index")
    table = table.assign(**{"class": names[labels], "label": labels, "prediction": predicted})
    table["predicted_class"] = names[predicted]
    probabilities = logits.double().softmax(1).numpy()
    table[[f"p_{name}" for name in classes]] = probabilities
    return table.join(cycles[[name for name in cycles.columns if name not in table.columns]])
