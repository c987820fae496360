from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.component import Mixed, Transform, build, describe
from respiro.transforms.mixing import CutMix, Mixup, PatchMix, patch_mix

MODES = ["patch", "time", "freq", "block"]
GRID = (4, 6)
HALF = 1e6  # a beta whose draws are 0.5, up to 0.002


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(batch: int, grid: tuple[int, int] = GRID, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens of which each value tells the sample, the place and the dimension."""
    return torch.arange(batch * grid[0] * grid[1] * 2).view(batch, -1, 2).to(dtype)


def features_of(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 7, 5, generator=seeded(9)).to(dtype)


def loop(tokens: Tensor, index: list[int], masks: list[list[bool]]) -> list[Any]:
    """Token by token: that of the partner where the mask says so."""
    return [
        [tokens[index[i] if masked else i, n].tolist() for n, masked in enumerate(mask)] for i, mask in enumerate(masks)
    ]


@pytest.mark.parametrize("tag", ["patch", "time"])
def test_patch_mix_reproduces_the_released_code(golden: Path, tag: str) -> None:
    vectors = np.load(golden / "patchmix" / "patch_mix.npz")
    x, index = torch.from_numpy(vectors[f"{tag}_x"]), torch.from_numpy(vectors[f"{tag}_index"])
    freq, time = vectors[f"{tag}_hw"]
    ids = torch.zeros(freq * time if tag == "patch" else time, dtype=torch.bool)
    ids[vectors[f"{tag}_mask"]] = True
    mixed = patch_mix(x, index, ids if tag == "patch" else ids.expand(freq, time).flatten())
    assert torch.equal(mixed.x, torch.from_numpy(vectors[f"{tag}_mixed"]))
    assert mixed.lam.item() == np.float32(vectors[f"{tag}_lam"])
    assert torch.equal(torch.from_numpy(vectors[f"{tag}_y"])[mixed.index], torch.from_numpy(vectors[f"{tag}_y_b"]))


@pytest.mark.parametrize("tag", ["patch", "time"])
def test_as_many_tokens_are_drawn_as_by_the_released_code(
    golden: Path, tag: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the λ that the released code drew, handed out in the place of numpy's."""
    vectors = np.load(golden / "patchmix" / "patch_mix.npz")
    drawn = np.array([vectors[f"{tag}_lam_drawn"]])

    class Drawn:
        def beta(self, a: float, b: float, size: int) -> np.ndarray:
            return drawn

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Drawn())
    _, mask = PatchMix(tag).draw(6, (12, 79))
    assert mask.sum() == len(vectors[f"{tag}_mask"]) * (1 if tag == "patch" else 12)


@pytest.mark.parametrize("index", [[1, 2, 0], [0, 2, 1], [0, 1, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["per-batch", "per-sample"])
def test_patch_mix_token_by_token(index: list[int], per_sample: bool) -> None:
    tokens = tokens_of(3)
    mask = torch.rand(3, 24, generator=seeded()) < 0.4 if per_sample else torch.rand(24, generator=seeded()) < 0.4
    mixed = patch_mix(tokens, torch.tensor(index), mask)
    masks = mask.expand(3, 24).tolist()
    shares = [1 - sum(row) / 24 for row in masks]
    assert mixed.x.tolist() == loop(tokens, index, masks)
    assert mixed.lam.tolist() == pytest.approx(shares if per_sample else shares[0], abs=1e-7)
    assert mixed.index.tolist() == index
    assert mixed.lam.dtype == torch.float32


@pytest.mark.parametrize(("masked", "lam"), [(False, 1.0), (True, 0.0)], ids=["nothing", "everything"])
def test_patch_mix_at_the_ends(masked: bool, lam: float) -> None:
    tokens, index = tokens_of(3), torch.tensor([1, 2, 0])
    mixed = patch_mix(tokens, index, torch.full((24,), masked))
    assert torch.equal(mixed.x, tokens[index] if masked else tokens)
    assert mixed.lam.item() == lam


def test_the_gradient_reaches_both_samples() -> None:
    tokens = tokens_of(3, dtype=torch.float64).requires_grad_()
    mask = torch.rand(3, 24, generator=seeded()) < 0.5
    assert torch.autograd.gradcheck(lambda x: patch_mix(x, torch.tensor([1, 2, 0]), mask).x, (tokens,))


def region(mode: str, mask: list[bool], grid: tuple[int, int]) -> bool:
    """Whether the masked tokens are what the mode replaces: whole columns, whole rows, or one rectangle."""
    freq, time = grid
    places = {divmod(n, time) for n, masked in enumerate(mask) if masked}
    rows, columns = {f for f, _ in places}, {t for _, t in places}
    allowed = {
        "patch": places,
        "time": set(itertools.product(range(freq), columns)),
        "freq": set(itertools.product(rows, range(time))),
        "block": set(
            itertools.product(
                range(min(rows, default=0), max(rows, default=-1) + 1),
                range(min(columns, default=0), max(columns, default=-1) + 1),
            )
        ),
    }
    return places == allowed[mode]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_replaces_its_own_kind_of_region(mode: Any) -> None:
    _, masks = PatchMix(mode, per_sample=True).draw(200, GRID, seeded())
    assert masks.shape == (200, 24)
    assert all(region(mode, mask, GRID) for mask in masks.tolist())
    assert len({tuple(mask) for mask in masks.tolist()}) > 10


@pytest.mark.parametrize(
    ("mode", "grid", "expected"), [("patch", (3, 3), 4), ("time", (2, 5), 4), ("freq", (5, 2), 4)], ids=lambda v: str(v)
)
def test_every_choice_is_equally_likely(mode: Any, grid: tuple[int, int], expected: int) -> None:
    """With λ = 0.5: 4 of 9 tokens, 2 of 5 columns, 2 of 5 rows; never one choice more often than another."""
    _, masks = PatchMix(mode, beta=HALF, per_sample=True).draw(20_000, grid, seeded())
    choices, counts = torch.unique(masks, dim=0, return_counts=True)
    assert (choices.sum(1) == expected).all()
    assert len(choices) == {"patch": 126, "time": 10, "freq": 10}[mode]
    rate = 20_000 / len(choices)
    assert (counts - rate).abs().max() < 5 * rate**0.5


def rectangles(grid: tuple[int, int], sides: tuple[int, int]) -> list[list[bool]]:
    """One rectangle around each token, cut off at the edges."""
    found = []
    for centre in itertools.product(range(grid[0]), range(grid[1])):
        low = [middle - side // 2 for middle, side in zip(centre, sides, strict=True)]
        found.append(
            [
                low[0] <= f < low[0] + sides[0] and low[1] <= t < low[1] + sides[1]
                for f, t in itertools.product(range(grid[0]), range(grid[1]))
            ]
        )
    return found


def test_blocks_lie_around_a_uniform_token() -> None:
    """With λ = 0.5 the sides of a 6 x 10 grid are 4.24 and 7.07 tokens."""
    grid, sides = (6, 10), (4, 7)
    _, masks = PatchMix("block", beta=HALF, per_sample=True).draw(20_000, grid, seeded())
    expected = rectangles(grid, sides)
    assert {tuple(mask) for mask in masks.tolist()} == {tuple(mask) for mask in expected}
    share = torch.tensor(expected, dtype=torch.float32).mean(0)
    torch.testing.assert_close(masks.float().mean(0), share, atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["patch", "time", "freq"])
def test_every_token_is_replaced_equally_often(mode: Any) -> None:
    _, masks = PatchMix(mode, per_sample=True).draw(20_000, GRID, seeded())
    shares = masks.float().mean(0)
    # E[int(n (1 - λ))] / n of a uniform λ; n = what there is to choose from.
    choices = {"patch": 24, "time": 6, "freq": 4}[mode]
    torch.testing.assert_close(shares, torch.full((24,), (choices - 1) / 2 / choices), atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["patch", "time", "freq"])
@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_share_kept_is_distributed_as_beta(beta: float, mode: Any) -> None:
    """Quantiles of the λ of a fine grid against scipy's."""
    stats = pytest.importorskip("scipy.stats")
    _, masks = PatchMix(mode, beta, per_sample=True).draw(5_000, (40, 40), seeded())
    lam = 1 - masks.float().mean(1)
    quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
    expected = stats.beta(beta, beta).ppf(quantiles)
    assert lam.quantile(torch.tensor(quantiles)).tolist() == pytest.approx(expected, abs=0.045)
    assert lam.mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("per_sample", [False, True], ids=["per-batch", "per-sample"])
def test_partners_are_a_uniform_permutation_with_fixed_points(per_sample: bool) -> None:
    generator = seeded()
    draws = torch.stack([PatchMix(per_sample=per_sample).draw(4, (2, 2), generator)[0] for _ in range(2000)])
    assert (draws.sort(1).values == torch.arange(4)).all()
    shares = torch.stack([(draws == partner).float().mean(0) for partner in range(4)])
    torch.testing.assert_close(shares, torch.full((4, 4), 0.25), atol=0.05, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["per-batch", "per-sample"])
def test_patch_mix_mixes_as_it_draws(mode: Any, per_sample: bool) -> None:
    mix, tokens = PatchMix(mode, per_sample=per_sample), tokens_of(5)
    mixed = mix(tokens, GRID, seeded(3))
    index, mask = mix.draw(5, GRID, seeded(3))
    assert mask.shape == ((5, 24) if per_sample else (24,))
    assert mixed.x.tolist() == loop(tokens, index.tolist(), mask.expand(5, 24).tolist())
    assert torch.equal(mixed.index, index)
    torch.testing.assert_close(mixed.lam, 1 - mask.float().mean(-1))


Mix = Callable[[Tensor, "torch.Generator | None"], Mixed]
MIXES: dict[str, tuple[Mix, Callable[..., Tensor]]] = {
    **{
        f"patchmix-{mode}": (lambda x, g, mode=mode: PatchMix(mode, per_sample=True)(x, GRID, g), tokens_of)
        for mode in MODES
    },
    "patchmix-batch": (lambda x, g: PatchMix()(x, GRID, g), tokens_of),
    "mixup": (lambda x, g: Mixup()(x, g), features_of),
    "mixup-per-sample": (lambda x, g: Mixup(per_sample=True)(x, g), features_of),
    "cutmix": (lambda x, g: CutMix()(x, g), features_of),
    "cutmix-per-sample": (lambda x, g: CutMix(per_sample=True)(x, g), features_of),
}
every_mix = pytest.mark.parametrize(("mix", "samples"), MIXES.values(), ids=MIXES.keys())


@every_mix
def test_a_seed_fixes_the_draw(mix: Mix, samples: Callable[..., Tensor]) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (mix(samples(6), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x, other.x)


@every_mix
def test_without_a_generator_torchs_own_seed_counts(mix: Mix, samples: Callable[..., Tensor]) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(mix(samples(6), None))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_mix
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shape_type_and_finite_values(mix: Mix, samples: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = samples(6, dtype=dtype).requires_grad_()
    mixed = mix(x, seeded())
    mixed.x.float().sum().backward()
    assert (mixed.x.shape, mixed.x.dtype) == (x.shape, dtype)
    assert (mixed.index.dtype, mixed.lam.dtype) == (torch.int64, torch.float32)
    assert mixed.lam.shape in ((), (6,))
    assert ((mixed.lam >= 0) & (mixed.lam <= 1)).all()
    assert mixed.x.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@every_mix
def test_the_input_is_not_changed(mix: Mix, samples: Callable[..., Tensor]) -> None:
    x = samples(6)
    before = x.clone()
    mixed = mix(x, seeded())
    assert not torch.equal(mixed.x, before)
    mixed.x.zero_()
    assert torch.equal(x, before)


@every_mix
def test_what_comes_out_is_on_the_device_of_the_input(mix: Mix, samples: Callable[..., Tensor]) -> None:
    assert {part.device.type for part in mix(samples(6).to("meta"), seeded())} == {"meta"}


@every_mix
def test_a_batch_of_one_is_refused(mix: Mix, samples: Callable[..., Tensor]) -> None:
    with pytest.raises(
        ValueError, match="mixing needs at least two samples, got 1; give the datamodule drop_last=True"
    ):
        mix(samples(1), None)


@every_mix
def test_a_batch_of_equal_samples_stays_as_it_is(mix: Mix, samples: Callable[..., Tensor]) -> None:
    x = samples(1).expand(6, -1, -1)
    torch.testing.assert_close(mix(x, seeded()).x, x)


@pytest.mark.parametrize("per_sample", [False, True], ids=["per-batch", "per-sample"])
def test_mixup_is_its_equation(per_sample: bool) -> None:
    features = features_of(5, torch.float64)
    mixed = Mixup(per_sample=per_sample)(features, seeded())
    lam = mixed.lam.expand(5).tolist()
    for i, partner in enumerate(mixed.index.tolist()):
        expected = [
            [lam[i] * own + (1 - lam[i]) * other for own, other in zip(*rows, strict=True)]
            for rows in zip(features[i].tolist(), features[partner].tolist(), strict=True)
        ]
        np.testing.assert_allclose(mixed.x[i].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("per_sample", [False, True], ids=["per-batch", "per-sample"])
def test_cutmix_replaces_one_rectangle(per_sample: bool) -> None:
    """Every value tells its sample, so that the rectangle and the share kept can be read from what comes out."""
    features = torch.arange(60.0).view(60, 1, 1).expand(60, 7, 5)
    mixed = CutMix(per_sample=per_sample)(features, seeded(1))
    lam, cut = mixed.lam.expand(60).tolist(), set()
    for i, partner in enumerate(mixed.index.tolist()):
        assert set(mixed.x[i].unique().tolist()) <= {i, partner}
        if partner != i:
            mask = (mixed.x[i] == partner).flatten().tolist()
            cut.add(tuple(mask))
            assert region("block", mask, (7, 5))
            assert lam[i] == pytest.approx(1 - sum(mask) / 35)
    assert len(cut) > 10 if per_sample else len(cut) == 1


def test_cutmix_cuts_the_share_that_its_sides_make() -> None:
    """With λ = 0.5 the sides of 798 frames and 128 bins are 564 and 91; the least is left of them at a corner."""
    lam = CutMix(beta=HALF, per_sample=True)(torch.zeros(64, 798, 128), seeded()).lam
    assert lam.min() >= 1 - 565 * 91 / (798 * 128)
    assert lam.max() <= 1 - 281 * 45 / (798 * 128)
    assert lam.mean() > 0.5


@pytest.mark.parametrize("mix", [Mixup(), CutMix(), PatchMix()], ids=["mixup", "cutmix", "patchmix"])
def test_eval_mode_mixes_too(mix: Transform) -> None:
    x = torch.randn(8, 24, 3, generator=seeded())
    arguments = (GRID,) if isinstance(mix, PatchMix) else ()
    assert not torch.equal(mix.eval()(x, *arguments, generator=seeded(1)).x, x)


@pytest.mark.parametrize(
    "mix", [PatchMix("time", 0.5, True), Mixup(0.4, True), CutMix(2.0)], ids=["patchmix", "mixup", "cutmix"]
)
def test_a_mix_is_built_from_plain_data(mix: Transform) -> None:
    assert build(describe(mix), Transform, "mix").init_args == mix.init_args


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("mix", [PatchMix, Mixup, CutMix])
def test_a_beta_without_meaning(mix: Any, beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta must be positive and finite, got {beta!r}"):
        mix(beta=beta)


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be one of 'patch', 'time', 'freq', 'block', got 'group'"):
        PatchMix("group")  # type: ignore[arg-type]  # what a config file may hold


@pytest.mark.parametrize("grid", [(12, 79), (6, 5), (24,), (2, 3, 4)], ids=str)
def test_a_grid_that_does_not_hold_the_tokens(grid: Any) -> None:
    with pytest.raises(ValueError, match=r"grid must be \(freq, time\) of 24 tokens in all, got \("):
        PatchMix()(tokens_of(2), grid)


@pytest.mark.parametrize("grid", [(12, 0), (-2, -3)], ids=str)
def test_fewer_frames_than_a_patch_needs(grid: tuple[int, int]) -> None:
    message = r"grid must have a row and a column at least, got \(.*\); pad clips shorter than a patch"
    with pytest.raises(ValueError, match=message):
        PatchMix()(torch.zeros(2, grid[0] * grid[1], 8), grid)


def test_cutmix_without_frames() -> None:
    with pytest.raises(ValueError, match=r"grid must have a row and a column at least, got \(0, 128\)"):
        CutMix()(torch.zeros(2, 0, 128))


@pytest.mark.parametrize("x", [torch.zeros(4, 24), torch.zeros(4, 24, 2, 2), torch.zeros(4, 24, 2, dtype=torch.int64)])
@pytest.mark.parametrize(
    ("mix", "name"),
    [
        (lambda x: PatchMix()(x, GRID), r"tokens must be floating point of shape \(B, N, D\)"),
        (lambda x: patch_mix(x, torch.zeros(4), torch.zeros(24)), r"tokens must be floating point of shape"),
        (Mixup(), r"features must be floating point of shape \(B, T, F\)"),
        (CutMix(), r"features must be floating point of shape \(B, T, F\)"),
    ],
    ids=["patchmix", "patch_mix", "mixup", "cutmix"],
)
def test_another_shape_or_type(mix: Callable[[Tensor], Mixed], name: str, x: Tensor) -> None:
    with pytest.raises(ValueError, match=f"{name}.*, got torch"):
        mix(x)


@pytest.mark.parametrize(
    ("index", "mask", "message"),
    [
        ([1, 2, 0, 1], [True] * 24, r"index must be int64 of shape \(3,\).* of shape \(4,\)"),
        ([1.0, 2.0, 0.0], [True] * 24, "index must be int64 .* got torch.float32"),
        ([1, 2, 3], [True] * 24, r"index must name samples of the batch, 0 to 2, got \[1, 2, 3\]"),
        ([-1, 2, 0], [True] * 24, r"index must name samples of the batch, 0 to 2, got \[-1, 2, 0\]"),
        ([1, 2, 0], [True] * 23, r"mask must be bool of shape \(24,\) or \(3, 24\) .* of shape \(23,\)"),
        ([1, 2, 0], [[True] * 24] * 2, r"mask must be bool .* of shape \(2, 24\)"),
        ([1, 2, 0], [0, 1] * 12, "mask must be bool .* got torch.int64"),
    ],
    ids=["index-shape", "index-type", "partner-beyond", "partner-negative", "mask-shape", "mask-batch", "mask-type"],
)
def test_an_index_or_mask_that_does_not_fit(index: list[Any], mask: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_mix(tokens_of(3), torch.tensor(index), torch.tensor(mask))


def test_mixup_leaves_some_samples_whole() -> None:
    """With p below 1 the others keep a share of exactly 1, and of the mixed ones each its own or the batch's."""
    features = features_of(2000)
    for per_sample in (False, True):
        mixed = Mixup(0.4, per_sample=per_sample, p=0.3)(features, generator=seeded())
        whole = mixed.lam == 1
        assert mixed.lam.shape == (2000,)
        assert 0.65 < whole.float().mean() < 0.75
        assert torch.equal(mixed.x[whole], features[whole])
        own = mixed.lam[~whole].view(-1, 1, 1)
        expected = own * features[~whole] + (1 - own) * features[mixed.index[~whole]]
        torch.testing.assert_close(mixed.x[~whole], expected)
        assert (mixed.lam[~whole].unique().numel() == 1) is not per_sample


@pytest.mark.parametrize(("p", "whole"), [(0.0, True), (1.0, False)], ids=["never", "always"])
def test_the_ends_of_p(p: float, whole: bool) -> None:
    features = features_of(8)
    assert torch.equal(Mixup(HALF, p=p)(features, generator=seeded()).x, features) is whole


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_is_a_probability(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got"):
        Mixup(p=p)
