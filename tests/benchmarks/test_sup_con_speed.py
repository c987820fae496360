"""What the supervised contrastive loss costs on a large batch. Run with ``-m benchmark -s``.

Beside pytorch-metric-learning's and the equation as one writes it down. Run as a script, this file is the process whose
time and memory are measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.losses import SupConLoss

pytestmark = pytest.mark.benchmark

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROWS, WIDTH, LABELS, TEMPERATURE = 8192, 128, 4, 0.06
SQUARE = ROWS**2 * 4 / 2**20  # MiB of a similarity matrix
ROUNDS = 3


def respiro() -> Callable[[Tensor, Tensor], Tensor]:
    return SupConLoss(TEMPERATURE)


def pytorch_metric_learning() -> Callable[[Tensor, Tensor], Tensor]:
    from pytorch_metric_learning.losses import SupConLoss as TheirSupConLoss

    theirs: Callable[[Tensor, Tensor], Tensor] = TheirSupConLoss(TEMPERATURE)
    return theirs


def written_out() -> Callable[[Tensor, Tensor], Tensor]:
    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        z = F.normalize(embeddings)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_shares = (z @ z.T / TEMPERATURE).masked_fill(itself, float("-inf")).log_softmax(1)
        positives = (labels[:, None] == labels) & ~itself
        return -(log_shares.masked_fill(~positives, 0).sum(1) / positives.sum(1)).mean()

    return loss


WAYS = [respiro, pytorch_metric_learning, written_out]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_time_and_memory_of_a_large_batch(device: str) -> None:
    pytest.importorskip("pytorch_metric_learning")
    found = {way.__name__: in_its_own_process(way.__name__, device) for way in WAYS}
    base = found["respiro"]
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\nSupCon of {ROWS} x {WIDTH}, {LABELS} labels, forward and backward, {where}; a square: {SQUARE:.0f} MiB")
    for name, each in found.items():
        print(
            f"  {name:24} {each['seconds']:8.3f} s ({each['seconds'] / base['seconds']:5.2f}), "
            f"on the processor {each['cpu_seconds']:8.3f} s ({each['cpu_seconds'] / base['cpu_seconds']:5.2f}), "
            f"memory {each['mib']:6.0f} MiB ({each['mib'] / base['mib']:5.2f})"
        )
        assert each["loss"] == pytest.approx(base["loss"], rel=1e-5)
    assert base["mib"] < SQUARE


def in_its_own_process(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(way: str, device: str) -> None:
    loss = globals()[way]()
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(ROWS, WIDTH, generator=generator).to(device).requires_grad_()
    labels = torch.randint(LABELS, (ROWS,), generator=generator).to(device)
    step(loss, embeddings[:64], labels[:64])  # loads what is needed, of which the memory is not the loss's own
    before = peak(device)
    rounds = []
    for _ in range(ROUNDS):
        started, on_processor = time.perf_counter(), time.process_time()
        value = step(loss, embeddings, labels).item()
        rounds.append((time.perf_counter() - started, time.process_time() - on_processor))
    seconds, cpu_seconds = map(min, zip(*rounds, strict=True))  # other work on the machine can only slow one down
    print(json.dumps({"loss": value, "seconds": seconds, "cpu_seconds": cpu_seconds, "mib": peak(device) - before}))


def step(loss: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = loss(embeddings, labels)
    value.backward()
    return value.detach()


def peak(device: str) -> float:
    """Return the most memory in MiB that was held so far; on a CPU that of the process since it was started (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


if __name__ == "__main__":
    main(*sys.argv[1:])
