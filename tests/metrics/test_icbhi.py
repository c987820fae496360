from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.metrics import confusion_matrix, recall_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from respiro.errors import LabelError
from respiro.metrics import ICBHIScore, ICBHISensitivity, ICBHISpecificity, icbhi_metrics
from respiro.metrics._counts import metrics_for, rates_for

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_labels(size: int = 500, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (size,), generator=generator)
    scores = torch.randn(size, classes, generator=generator) + torch.eye(classes)[target]
    return scores, target


def as_floats(metrics: MetricCollection) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_rates_match_scikit_learn(classes: int) -> None:
    scores, target = random_labels(classes=classes)
    predicted = scores.argmax(1)
    sensitivity = recall_score(target, predicted, labels=list(range(1, classes)), average="micro")
    specificity = recall_score(target, predicted, labels=[0], average="macro")
    metrics = icbhi_metrics(classes)
    metrics.update(scores, target)
    expected = {"sensitivity": sensitivity, "specificity": specificity, "score": (sensitivity + specificity) / 2}
    assert as_floats(metrics) == pytest.approx(expected, abs=1e-6)
    assert (metrics["score"].confmat.numpy() == confusion_matrix(target, predicted)).all()


def test_two_class_from_four_is_the_collapsed_two_class_score() -> None:
    scores, target = random_labels()
    predicted = scores.argmax(1)
    four, two = icbhi_metrics(4, two_class=True), icbhi_metrics(2)
    four.update(scores, target)
    two.update((predicted > 0).long(), (target > 0).long())
    assert as_floats(four) == pytest.approx(as_floats(two))
    assert as_floats(four)["sensitivity"] > float(ICBHISensitivity()(scores, target))


def test_golden_patch_mix(golden: Path) -> None:
    data = np.load(golden / "patchmix" / "score.npz")
    preds, target = torch.from_numpy(data["a_preds"]), torch.from_numpy(data["a_labels"])
    for metrics, key in (
        (icbhi_metrics(), "a_4cls"),
        (icbhi_metrics(two_class=True), "a_4cls_two"),
    ):
        metrics.update(preds, target)
        value = as_floats(metrics)
        assert [100 * value[name] for name in ("specificity", "sensitivity", "score")] == pytest.approx(
            data[key], abs=1e-5
        )
    binary = icbhi_metrics(2)
    binary.update((preds > 0).long(), (target > 0).long())
    assert 100 * as_floats(binary)["score"] == pytest.approx(data["a_2cls"][2], abs=1e-5)
    exact = rates_for(torch.from_numpy(confusion_matrix(target, preds)).double(), "icbhi", ("n", "c", "w", "b"))
    assert 100 * exact["score"].item() == pytest.approx(data["a_4cls"][2], abs=1e-9)  # the reference adds 1e-10
    assert 100 * exact["two_class_score"].item() == pytest.approx(data["a_4cls_two"][2], abs=1e-9)


@pytest.mark.parametrize("case", [0, 1])
def test_golden_scl(golden: Path, case: int) -> None:
    data = np.load(golden / "scl" / "metrics.npz")
    counts = torch.from_numpy(confusion_matrix(data["y"][case], data["pred"][case], labels=range(4))).double()
    rates = rates_for(counts, "icbhi", ("n", "c", "w", "b"))
    expected = {"sensitivity": "se", "specificity": "sp", "score": "score"}
    for name, key in expected.items():
        assert rates[name].item() == pytest.approx(data[key][case], abs=1e-12)
    metrics = icbhi_metrics()
    metrics.update(torch.from_numpy(data["pred"][case]), torch.from_numpy(data["y"][case]))
    assert as_floats(metrics) == pytest.approx({name: data[key][case] for name, key in expected.items()}, abs=1e-6)


def test_batches_in_any_size_give_the_whole() -> None:
    scores, target = random_labels(103)
    whole, batched = icbhi_metrics(), icbhi_metrics()
    whole.update(scores, target)
    for part in torch.arange(103).split(8):
        batched.update(scores[part], target[part])
    assert as_floats(batched) == as_floats(whole)


def test_a_collection_shares_one_matrix_and_can_be_read_between_updates() -> None:
    scores, target = random_labels(40)
    metrics = icbhi_metrics()
    seen = []
    for half in (slice(0, 20), slice(20, 40)):
        metrics.update(scores[half], target[half])
        seen.append(as_floats(metrics))
    assert metrics.compute_groups == {0: ["score", "sensitivity", "specificity"]}
    assert len({id(metric.confmat) for metric in metrics.values(copy_state=False)}) == 1
    alone = [float(kind()(scores, target)) for kind in (ICBHIScore, ICBHISensitivity, ICBHISpecificity)]
    assert list(seen[1].values()) == pytest.approx(alone)
    assert seen[0] != seen[1]


def test_reset_clone_and_copy_are_independent() -> None:
    scores, target = random_labels(50)
    metrics = icbhi_metrics()
    metrics.update(scores, target)
    clone, copied = metrics.clone(prefix="val_"), copy.deepcopy(metrics)
    before = as_floats(metrics)
    metrics.reset()
    assert int(metrics["score"].confmat.sum()) == 0
    assert {name.removeprefix("val_"): value for name, value in as_floats(clone).items()} == before
    assert as_floats(copied) == before
    metrics.update(scores[:10], target[:10])
    assert int(metrics["score"].confmat.sum()) == 10
    assert int(copied["score"].confmat.sum()) == 50


def test_the_state_survives_inference_mode() -> None:
    scores, target = random_labels(20)
    metric = ICBHIScore()
    with torch.inference_mode():
        metric.reset()
        metric.update(scores[:10], target[:10])
    metric.update(scores[10:], target[10:])
    assert float(metric.compute()) == float(ICBHIScore()(scores, target))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_devices_and_dtypes(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    scores, target = random_labels(64)
    scores = (8 * scores).round().to(device, dtype)  # exact in every dtype
    metrics = icbhi_metrics().to(device)
    metrics.update(scores, target.to(device, torch.int32))
    value = metrics.compute()["score"]
    assert value.ndim == 0
    assert value.dtype == torch.float32
    assert value.device.type == device
    assert metrics["score"].confmat.dtype == torch.int64
    assert float(value) == float(ICBHIScore()(scores.cpu().argmax(1), target))


@pytest.mark.parametrize(
    ("target", "undefined"),
    [
        ([0, 0], {"sensitivity", "score"}),
        ([1, 3], {"specificity", "score"}),
        ([-1, -1], {"sensitivity", "specificity", "score"}),
    ],
    ids=["all-normal", "all-abnormal", "all-ignored"],
)
def test_a_rate_over_no_cycles_is_nan(target: list[int], undefined: set[str]) -> None:
    metrics = icbhi_metrics()
    metrics.update(torch.tensor([0, 1]), torch.tensor(target))
    assert {name for name, value in as_floats(metrics).items() if math.isnan(value)} == undefined


def test_ignored_targets_do_not_count() -> None:
    scores, target = random_labels(60)
    target[::3] = -1
    kept = target >= 0
    assert float(ICBHIScore()(scores, target)) == float(ICBHIScore()(scores[kept], target[kept]))


def test_an_empty_batch_changes_nothing() -> None:
    metric = ICBHIScore()
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    metric.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert float(metric.compute()) == 1.0


@pytest.mark.parametrize("counts", [(1579, 649, 385, 143), (1, 1, 0, 0)], ids=["official-test", "two-cycles"])
def test_calling_all_normal_scores_one_half(counts: tuple[int, ...]) -> None:
    target = torch.arange(4).repeat_interleave(torch.tensor(counts))
    for two_class in (False, True):
        assert float(ICBHIScore(two_class=two_class)(torch.zeros_like(target), target)) == 0.5


@pytest.mark.parametrize(
    ("preds", "target", "error", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), ValueError, r"scores of shape \(3, 4\)"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), ValueError, r"scores of shape \(3, 4\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), ValueError, "integer labels of shape"),
        (torch.zeros(3, 4), torch.zeros(3), ValueError, "target must be integer labels"),
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64), ValueError, "target must be integer labels"),
        (torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.int64), ValueError, "NaN scores .first: row 0 of 3"),
        (torch.zeros(3, 4), torch.tensor([0, 4, 1]), LabelError, "target must lie in 0 to 3 .-1 is ignored., got 4"),
        (torch.zeros(3, 4), torch.tensor([0, -2, 1]), LabelError, "got -2"),
        (torch.tensor([0, 7, 1]), torch.tensor([0, 0, 1]), LabelError, "preds must lie in 0 to 3, got 7"),
        (torch.tensor([0, -1, 1]), torch.tensor([0, 0, 1]), LabelError, "preds must lie in 0 to 3, got -1"),
    ],
    ids=["classes", "length", "float-labels", "float-target", "one-hot", "nan", "high", "low", "pred-high", "pred-low"],
)
def test_wrong_input_is_named(preds: Tensor, target: Tensor, error: type[Exception], message: str) -> None:
    metric = ICBHIScore()
    with pytest.raises(error, match=message):
        metric.update(preds, target)
    assert int(metric.confmat.sum()) == 0


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        ICBHIScore(1)


def test_the_scoring_rule_chooses_the_metrics() -> None:
    assert set(metrics_for("icbhi", ("normal", "abnormal"))) == {"score", "sensitivity", "specificity"}
    assert metrics_for("icbhi", ("normal", "abnormal"))["score"].num_classes == 2
    with pytest.raises(ValueError, match="scoring must be 'icbhi' or 'sprsound', got 'f1'"):
        metrics_for("f1", ("normal", "abnormal"))


def test_lightning_logs_the_exact_value_over_several_epochs() -> None:
    scores, target = random_labels(37)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = icbhi_metrics().clone(prefix="test_")

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.metrics.update(*batch)
            self.log_dict(dict(self.metrics), on_epoch=True, batch_size=len(batch[0]))

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    module, loader = Module(), DataLoader(TensorDataset(scores, target), batch_size=8)
    expected = icbhi_metrics()
    expected.update(scores, target)
    for _ in range(2):
        (result,) = trainer.test(module, loader, verbose=False)
        assert result == pytest.approx({f"test_{name}": value for name, value in as_floats(expected).items()})


TWO_PROCESSES = """
import multiprocessing, os, sys, torch, torch.distributed as dist
from respiro.metrics import icbhi_metrics

def run(rank):
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    preds, target = torch.arange(7) % 4, torch.tensor([0, 1, 2, 3, 0, 2, 2])
    metrics = icbhi_metrics()
    metrics.update(preds[rank::2], target[rank::2])
    line = str({name: round(float(value), 6) for name, value in metrics.compute().items()}) + "\\n"
    os.write(1, line.encode())  # in one piece, or the two processes write into each other's lines
    dist.destroy_process_group()

context = multiprocessing.get_context("fork")  # forked from a fresh process, which has imported all and run nothing
processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    metrics = icbhi_metrics()
    metrics.update(torch.arange(7) % 4, torch.tensor([0, 1, 2, 3, 0, 2, 2]))
    expected = {name: round(value, 6) for name, value in as_floats(metrics).items()}
    assert run.stdout.splitlines() == [str(expected)] * 2


def test_importing_the_metrics_loads_nothing_heavy() -> None:
    """Beyond what torchmetrics itself loads, which is matplotlib where it is installed."""
    code = (
        "import sys, torchmetrics; before = set(sys.modules); import respiro.metrics; "
        "heavy = {'matplotlib', 'librosa', 'torchaudio', 'timm', 'lightning', 'pandas'}; "
        "print(sorted(heavy & (set(sys.modules) - before)), 'timm' in sys.modules, 'torchaudio' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] False False"
