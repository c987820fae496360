"""What two views cost in the front end, and what the probe costs. Run with ``-m benchmark -s``.

What is compared takes turns. Seconds on the processor, those of all threads together, tell more than the clock where
other programs use the same cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from respiro.methods import SCL
from respiro.methods._probe import Embedded, fit_head, scorer
from respiro.methods._views import labels_of
from respiro.models import CNN6

pytestmark = pytest.mark.benchmark

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CLASSES = ("normal", "crackle", "wheeze", "both")
COUNTS = (2063, 1215, 501, 363)  # train cycles of ICBHI's official split
ROUNDS = 5

Times = tuple[float, float]


def seconds(work: Callable[[], object], device: str = "cpu") -> Times:
    """Return what a call takes by the clock, until the device has done it, and on the processor."""
    wait(device)
    clock, processor = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return time.perf_counter() - clock, time.process_time() - processor


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(works: Mapping[str, Callable[[], object]], device: str = "cpu", rounds: int = ROUNDS) -> dict[str, Times]:
    """Return the median of both times of each, the first call not counted."""
    for work in works.values():
        work()
    measured = [[seconds(work, device) for work in works.values()] for _ in range(rounds)]
    medians = [tuple(map(median, zip(*times, strict=True))) for times in zip(*measured, strict=True)]
    return dict(zip(works, medians, strict=True))  # type: ignore[arg-type]


def where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------- two views


def one_extraction(model: SCL, waveform: Tensor) -> tuple[Tensor, Tensor]:
    features = model.features(waveform)
    return features, features


def two_extractions(model: SCL, waveform: Tensor) -> tuple[Tensor, Tensor]:
    return model.features(waveform), model.features(waveform)


WAYS = (one_extraction, two_extractions)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_two_views_from_one_extraction(device: str) -> None:
    torch.manual_seed(0)
    model = SCL(CNN6()).to(device).train()
    batch = {
        "waveform": 0.1 * torch.randn(16, 8 * 16000, device=device),
        "label": torch.randint(4, (16,), device=device),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_of(extract: Callable[[SCL, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        views = [model.augment(features) for features in extract(model, batch["waveform"])]
        embeddings = torch.cat([model.backbone(view) for view in views])
        loss: Tensor = model.loss(model.projector(embeddings), labels_of(batch, "label"))
        return loss

    def step(extract: Callable[[SCL, Tensor], tuple[Tensor, Tensor]]) -> None:
        optimizer.zero_grad()
        loss_of(extract).backward()
        optimizer.step()

    losses = []
    for way in WAYS:
        torch.manual_seed(1)
        losses.append(loss_of(way).detach())
    torch.testing.assert_close(*losses)  # the front end draws nothing, so nothing is lost
    front = in_turns({way.__name__: partial(way, model, batch["waveform"]) for way in WAYS}, device, rounds=15)
    whole = in_turns({way.__name__: partial(step, way) for way in WAYS}, device)
    print(f"\nSCL, CNN6, batch 16 of 8 s, float32, {where(device)}")
    for name in front:
        print(
            f"  {name:16} front end {front[name][0] * 1e3:7.1f} ms (processor {front[name][1] * 1e3:7.1f} ms), "
            f"step {whole[name][0] * 1e3:7.0f} ms (processor {whole[name][1] * 1e3:7.0f} ms), "
            f"share {front[name][0] / whole[name][0]:.1%} (processor {front[name][1] / whole[name][1]:.1%})"
        )
    clock, processor = (one / two for one, two in zip(front[WAYS[0].__name__], front[WAYS[1].__name__], strict=True))
    print(f"  front end once beside twice: {clock:.2f} (processor {processor:.2f})")


# ------------------------------------------------------------------------------------------------------------ the probe


def clustered(counts: tuple[int, ...], seed: int) -> Embedded:
    """Embeddings in overlapping clusters, one a class, of numbers that are not negative as those of CNN6 are."""
    centres = torch.randn(len(counts), 512, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(labels), 512, generator=torch.Generator().manual_seed(seed))
    return Embedded((0.15 * centres[labels] + noise).relu(), labels)


def test_the_probe_of_the_official_train_side() -> None:
    train, val = clustered(COUNTS, seed=1), clustered((400, 200, 100, 50), seed=2)
    score = scorer(val, CLASSES, "icbhi")
    alone = LogisticRegression(max_iter=5000, class_weight="balanced")
    found = in_turns(
        {
            "logistic": partial(fit_head, "logistic", train, CLASSES),
            "scikit-learn alone": partial(alone.fit, train.embeddings.double().numpy(), train.labels.numpy()),
            "adam, 100 epochs": partial(fit_head, "adam", train, CLASSES, score),
            "knn": partial(fit_head, "knn", train, CLASSES),
        },
        rounds=3,
    )
    print(f"\nprobe of {len(train.labels)} x 512 embeddings, 4 classes, {where('cpu')}; wanted: less than 10 s")
    for name, (clock, processor) in found.items():
        print(f"  {name:18} {clock:7.3f} s (processor {processor:7.3f} s)")
    print(f"  val score by logistic regression: {score(fit_head('logistic', train, CLASSES)):.3f}")
