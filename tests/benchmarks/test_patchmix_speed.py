"""How fast a step of Patch-Mix contrastive learning is, and what memory it takes. Run with ``-m benchmark -s``.

What is compared takes turns. ``-m "benchmark and gpu"`` measures the published size on a GPU alone: the step, and the
whole recipe. Run as a script, this file is the process whose memory is measured.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from respiro.methods import PatchMixCL
from respiro.models import AST
from respiro.transforms import SpecAugment

pytestmark = pytest.mark.benchmark

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
#: Dense bf16 TFLOP/s of the data sheets; the first that is part of the device's name counts.
PEAKS = {"H100 PCIe": 756, "NVL": 835, "H100": 989, "H200": 989, "A100": 312}
SECONDS = 8  # of a clip
CYCLES, EPOCHS = 4142, 50  # official train split, published training

Batch = dict[str, Tensor]
Way = Callable[[PatchMixCL, Batch], Tensor]


class Plan(NamedTuple):
    """Steps after the first before measuring starts, rounds, and steps in a round, at whose end a GPU is waited for."""

    warm_up: int
    rounds: int
    steps: int


PLANS = {"cpu": Plan(warm_up=0, rounds=3, steps=1), "cuda": Plan(warm_up=5, rounds=10, steps=10)}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Free the model, and let no graph be compiled for any batch size because an earlier test had another one."""
    yield
    torch.compiler.reset()
    gc.collect()


# ------------------------------------------------------------------------------------------------------------- a step


def recipe(size: Any, batch_size: int, device: str) -> tuple[PatchMixCL, Batch]:
    """The published recipe, and a batch of noise."""
    torch.manual_seed(0)
    model = PatchMixCL(AST(size, frames=100 * SECONDS - 2), augment=SpecAugment("icbhi_ast_sup"))
    model.logged = lambda loss, labels, **terms: loss  # type: ignore[method-assign]  # there is no trainer to log to
    batch = {
        "waveform": 0.1 * torch.randn(batch_size, SECONDS * 16000, device=device),
        "label": torch.randint(4, (batch_size,), device=device),
    }
    return model.to(device).train(), batch


def one_pass(model: PatchMixCL, batch: Batch) -> Tensor:
    return model.training_step(batch, 0)


def two_passes(model: PatchMixCL, batch: Batch) -> Tensor:
    """The same as the paper tells it: first the clean batch through the whole model, then the mixed one."""
    x, labels, ast = model.training_features(batch), batch["label"], model.backbone
    clean = ast(x)
    ce = model.loss(model.head(clean), labels)
    mix = model.patch_mix(ast.embed_patches(x), ast.grid)
    projected = model.projector(ast.forward_tokens(mix.x))
    cl = model.contrastive(projected, clean.detach(), mix.index, mix.lam)
    return ce + model.contrastive_weight * cl


def adam(model: PatchMixCL) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=5e-5, weight_decay=1e-6)


def loss_under(dtype: torch.dtype, model: PatchMixCL, batch: Batch, way: Way) -> Tensor:
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        return way(model, batch)


def step(
    optimizer: torch.optim.Optimizer, dtype: torch.dtype, model: PatchMixCL, batch: Batch, way: Way = one_pass
) -> None:
    loss = loss_under(dtype, model, batch, way)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------------------- what it costs


class Times(NamedTuple):
    first: float
    median: float
    #: Median over the rounds of what it took beside the first that was measured.
    ratio: float


def measure(device: str, works: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
    """Return seconds a call of each."""
    plan = PLANS[device]
    first = {label: seconds(device, work, 1) for label, work in works.items()}
    for work in works.values():
        for _ in range(plan.warm_up):
            work()
    rounds = [[seconds(device, work, plan.steps) for work in works.values()] for _ in range(plan.rounds)]
    base = [times[0] for times in rounds]
    result = {}
    for label, times in zip(works, zip(*rounds, strict=True), strict=True):
        ratio = median(time / of_base for time, of_base in zip(times, base, strict=True))
        result[label] = Times(first[label], median(times), ratio)
    return result


def seconds(device: str, work: Callable[[], object], calls: int) -> float:
    """Return the mean time of a call, until the device has done what it was asked for."""
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    wait(device)
    return (time.perf_counter() - started) / calls


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_on_gpu(work: Callable[[], object]) -> float:
    """Return the most memory in GiB that was in use during a step, weights and optimiser included."""
    torch.cuda.reset_peak_memory_stats()
    work()
    wait("cuda")
    return torch.cuda.max_memory_allocated() / 2**30


def peak_of_process(*arguments: str) -> float:
    """Return the most memory in GiB that a process of two steps held, the libraries included."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def flops_per_cycle(size: Any) -> float:
    """Return the operations on one cycle, clean and mixed, forward and backward.

    Attention counts as if written out: what a fused kernel computes a second time is no progress.
    """
    with torch.device("meta"):
        ast = written_out(AST(size, frames=100 * SECONDS - 2))
        features = torch.empty(1, ast.frames, ast.num_mel_bins)
    with FlopCounterMode(display=False) as counter:
        tokens = ast.embed_patches(features)
        ast.forward_tokens(torch.cat([tokens, tokens])).sum().backward()
    return counter.get_total_flops()


def written_out(ast: AST) -> AST:
    """Attention as a product, a softmax and a product, instead of torch's scaled_dot_product_attention."""
    for block in ast.v.blocks:
        block.attn.fused_attn = False
    return ast


# ------------------------------------------------------------------------------------------------------- the benchmarks


@pytest.mark.parametrize(
    ("device", "size", "dtype"),
    [
        pytest.param("cpu", "tiny224", torch.float32, id="cpu-float32"),
        pytest.param("cpu", "tiny224", torch.bfloat16, id="cpu-bf16"),
        pytest.param("cuda", "base384", torch.bfloat16, id="cuda-bf16", marks=GPU),
    ],
)
def test_one_pass_beside_two(device: str, size: str, dtype: torch.dtype) -> None:
    model, batch = recipe(size, 8, device)
    optimizer = adam(model)
    losses = []
    for way in (two_passes, one_pass):
        torch.manual_seed(1)
        losses.append(loss_under(dtype, model, batch, way).detach())
    torch.testing.assert_close(*losses, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=0)
    works = {way.__name__: partial(step, optimizer, dtype, model, batch, way) for way in (two_passes, one_pass)}
    times = measure(device, works)
    print(f"\nPatchMixCL, {size}, batch 8 of {SECONDS} s, {dtype}, {where(device)}")
    for label, work in works.items():
        peak = peak_on_gpu(work) if device == "cuda" else peak_of_process(label, size, str(dtype))
        _, each, ratio = times[label]
        print(f"  {label:10}  {each * 1e3:8.1f} ms/step, {ratio:.3f} of two passes, peak memory {peak:.2f} GiB")


@pytest.mark.parametrize(
    ("device", "size", "batch_size"),
    [pytest.param("cpu", "tiny224", 4, id="cpu"), pytest.param("cuda", "base384", 8, id="cuda", marks=GPU)],
)
def test_attention_precision_and_compilation(device: str, size: str, batch_size: int) -> None:
    works = {}
    for label, dtype, fused, compiled in (
        ("float32, attention written out", torch.float32, False, False),
        ("float32", torch.float32, True, False),
        ("float32, compiled", torch.float32, True, True),
        ("bf16, attention written out", torch.bfloat16, False, False),
        ("bf16", torch.bfloat16, True, False),
    ):
        model, batch = recipe(size, batch_size, device)
        if not fused:
            written_out(model.backbone)  # type: ignore[arg-type]
        if compiled:
            model.backbone.compile()
        works[label] = partial(step, adam(model), dtype, model, batch)
    times = measure(device, works)
    print(f"\nPatchMixCL step, {size}, batch {batch_size} of {SECONDS} s, {where(device)}")
    for label, (first, each, ratio) in times.items():
        compilation = f", first step with compilation {first:.0f} s" if "compiled" in label else ""
        print(f"  {label:30}  {each * 1e3:8.1f} ms/step, {ratio:.3f} of the first{compilation}")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("batch_size", [8, 128])
@pytest.mark.parametrize(("device", "size"), [pytest.param("cuda", "base384", id="cuda", marks=GPU)])
def test_recipe(device: str, size: str, batch_size: int, compiled: bool) -> None:
    """The whole step, from the waveform on the device to the new weights, under bf16-mixed precision."""
    model, batch = recipe(size, batch_size, device)
    if compiled:
        model.backbone.compile()
    work = partial(step, adam(model), torch.bfloat16, model, batch)
    times = measure(device, {"step": work, "features": partial(model.training_features, batch)})
    first, each, _ = times["step"]
    rate = batch_size / each
    tflops = flops_per_cycle(size) * rate / 1e12
    peak = next((peak for name, peak in PEAKS.items() if name in where(device)), None)
    share = "" if peak is None else f", {tflops / peak:.1%} of {peak}"
    memory = f", {peak_on_gpu(work):.1f} GiB" if device == "cuda" else ""
    print(f"\nPatchMixCL, {size}, batch {batch_size}, {'compiled' if compiled else 'eager'}, bf16, {where(device)}")
    print(
        f"  {1 / each:.2f} steps/s, {rate:.1f} cycles/s, {tflops:.1f} TFLOP/s{share}{memory}, first step {first:.0f} s"
    )
    print(
        f"  {each * 1e3:.1f} ms/step, of which features and SpecAugment {times['features'].median * 1e3:.1f} ms; "
        f"{EPOCHS} epochs of {CYCLES} cycles: {EPOCHS * CYCLES / rate / 60:.1f} min without validation"
    )


def where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def main(label: str, size: str, dtype: str) -> None:
    import resource

    model, batch = recipe(size, 8, "cpu")
    optimizer = adam(model)
    for _ in range(2):
        step(optimizer, getattr(torch, dtype.removeprefix("torch.")), model, batch, globals()[label])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # Linux counts in KiB


if __name__ == "__main__":
    main(*sys.argv[1:])
