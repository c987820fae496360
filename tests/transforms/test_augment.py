from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Generator, Tensor

from respiro.component import Transform, build, describe
from respiro.transforms.augment import SpecAugment, _warp, spec_augment

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NO_MASKS = torch.empty(1, 0, 2, dtype=torch.int64)
POLICIES = {  # time_warp, freq_width, freq_masks, time_width, p, time_masks
    "LB": (80, 27, 1, 100, 1, 1),
    "LD": (80, 27, 2, 100, 1, 2),
    "SM": (40, 15, 2, 70, 0.2, 2),
    "SS": (40, 27, 2, 70, 0.2, 2),
    "icbhi_sup": (0, 20, 2, 50, 1, 2),
    "icbhi_ast_sup": (0, 48, 2, 160, 1, 2),
}


def seeded(seed: int = 0, device: str = "cpu") -> Generator:
    return Generator(device).manual_seed(seed)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(), dtype=torch.float64).to(dtype)


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return str(request.param)


class TestGivenMasks:
    @pytest.mark.parametrize("seed", [0, 1, 3, 5])
    def test_gives_the_reference_output(self, golden: Path, seed: int) -> None:
        expected = np.load(golden / "patchmix" / "specaug.npz")
        features = np.random.default_rng(int(expected["x_seed"])).standard_normal((1, 798, 128)).astype(np.float32)
        masks = [torch.from_numpy(expected[f"s{seed}_{axis}"])[None] for axis in ("freq", "time")]
        masked = spec_augment(torch.from_numpy(features), *masks).numpy()
        assert masked.sum(dtype=np.float64) == pytest.approx(float(expected[f"s{seed}_sum"]), abs=1e-2)
        if seed == 0:  # the gate left it out
            np.testing.assert_array_equal(masked, features)
            return
        (first_bin, _), (first_frame, _) = expected[f"s{seed}_freq"][0], expected[f"s{seed}_time"][-1]
        assert masked[0, 0, first_bin] == pytest.approx(expected[f"s{seed}_fill"][0], abs=1e-6)
        assert masked[0, first_frame, 0] == pytest.approx(expected[f"s{seed}_fill"][1], abs=1e-6)
        if seed == 1:
            np.testing.assert_allclose(masked, expected["s1_y"], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("fill", ["mean", "zero", -14.47, 3])
    def test_fills_as_a_loop_over_clips_and_masks_does(self, device: str, fill: Any) -> None:
        features = noise(3, 20, 12)
        freq = torch.tensor([[[0, 3], [2, 4]], [[5, 0], [11, 1]], [[0, 12], [3, 2]]])  # overlap, none, all of it
        time = torch.tensor([[[18, 2]], [[0, 0]], [[15, 9]]])  # to the end, none, beyond the end
        expected = features.clone().numpy()
        for clip, of_bins, of_frames in zip(expected, freq.tolist(), time.tolist(), strict=True):
            value = clip.mean() if fill == "mean" else 0.0 if fill == "zero" else fill
            for start, width in of_bins:
                clip[:, start : start + width] = value
            value = clip.mean() if fill == "mean" else 0.0 if fill == "zero" else fill
            for start, width in of_frames:
                clip[start : start + width] = value
        masked = spec_augment(features.to(device), freq.to(device), time.to(device), fill)
        np.testing.assert_allclose(masked.cpu(), expected, rtol=0, atol=1e-6)

    def test_gradient_passes_what_is_not_masked(self) -> None:
        features = noise(1, 6, 5).requires_grad_()
        spec_augment(features, torch.tensor([[[1, 2]]]), torch.tensor([[[4, 1]]])).sum().backward()
        expected = torch.ones(1, 6, 5)
        expected[:, :, 1:3] = 0
        expected[:, 4] = 0
        assert features.grad is not None
        assert torch.equal(features.grad, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_mean_is_taken_in_float32(self, dtype: torch.dtype) -> None:
        features = (noise(1, 798, 128) + 200).to(dtype)  # their sum is beyond float16
        masked = spec_augment(features, torch.tensor([[[3, 1]]]), NO_MASKS)
        assert masked.dtype == dtype
        assert masked[0, 0, 3] == features.float().mean().to(dtype)

    def test_without_masks_it_is_a_copy(self) -> None:
        features = noise(1, 4, 4)
        masked = spec_augment(features, NO_MASKS, NO_MASKS)
        assert torch.equal(masked, features)
        assert masked.data_ptr() != features.data_ptr()

    @pytest.mark.parametrize(
        ("features", "masks", "fill", "message"),
        [
            pytest.param(noise(4, 4), NO_MASKS, "mean", r"\(B, T, F\), got torch.float32 of shape \(4, 4\)", id="2-d"),
            pytest.param(torch.ones(1, 4, 4).int(), NO_MASKS, "mean", "floating point", id="integers"),
            pytest.param(noise(2, 4, 4), NO_MASKS, "mean", r"freq_masks must have shape \(2, m, 2\)", id="one-sample"),
            pytest.param(noise(1, 4, 4), torch.ones(1, 2), "mean", "freq_masks must have shape", id="one-mask"),
            pytest.param(noise(1, 4, 4), NO_MASKS, "max", "fill must be 'mean', 'zero' or a finite", id="fill"),
        ],
    )
    def test_refuses_what_does_not_fit(self, features: Tensor, masks: Tensor, fill: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            spec_augment(features, masks, masks, fill)


class TestDraws:
    @pytest.mark.parametrize("dim", [1, 2], ids=["time", "frequency"])
    def test_widths_and_starts_are_uniform(self, dim: int) -> None:
        size, bound = 30, 10
        shape = (40000, size, 1) if dim == 1 else (40000, 1, size)
        only = {"freq_masks": int(dim == 2), "time_masks": int(dim == 1), "freq_width": bound, "time_width": bound}
        augment = SpecAugment("icbhi_sup", fill="zero", **only)
        hidden = augment(torch.ones(shape), generator=seeded()).flatten(1) == 0
        widths, starts = hidden.sum(1), hidden.int().argmax(1)
        assert (hidden.int().diff(dim=1).abs().sum(1) <= 2).all()  # in one piece
        counts = torch.bincount(widths)
        assert len(counts) == bound  # never of the bound itself
        assert chisquare(counts).pvalue > 1e-3
        for width in (1, bound - 1):
            counts = torch.bincount(starts[widths == width])
            assert len(counts) == size - width + 1
            assert chisquare(counts).pvalue > 1e-3

    def test_masks_that_end_before_the_last(self) -> None:
        augment = SpecAugment("icbhi_sup", fill="zero", to_end=False, freq_width=10, time_width=30)  # 30 frames
        hidden = augment(torch.ones(20000, 30, 12), generator=seeded()) == 0
        assert not hidden[:, -1, -1].any()  # hidden by any mask that reaches the end of its axis
        assert hidden[:, -2, -1].any()
        assert hidden[:, -1, -2].any()

    @pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("gate", ["uniform", "normal"])
    def test_gate_lets_its_share_through(self, p: float, gate: Any) -> None:
        # So many masks that one of them is certain to have a width.
        augment = SpecAugment(p=p, gate=gate, freq_masks=9, freq_width=30, time_masks=0, fill="zero")
        share = (augment(torch.ones(20000, 1, 30), generator=seeded()) == 0).any(2).float().mean().item()
        expected = p if gate == "uniform" else NormalDist().cdf(p)  # 0.8413 at p = 1
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20000))

    def test_gate_of_the_batch_lets_all_or_none_through(self) -> None:
        augment, generator = (
            SpecAugment(p=0.5, gate="normal-batch", freq_masks=9, freq_width=30, time_masks=0),
            seeded(),
        )
        numbers = torch.arange(60.0).reshape(2, 1, 30)
        changed = torch.stack([(augment(numbers, generator) != numbers).any(2)[:, 0] for _ in range(4000)])
        assert torch.equal(changed[:, 0], changed[:, 1])
        expected = NormalDist().cdf(0.5)
        assert changed[:, 0].float().mean().item() == pytest.approx(expected, abs=0.03)

    def test_every_sample_and_every_call_has_its_own(self) -> None:
        augment, generator = SpecAugment(fill="zero"), seeded()
        hidden = torch.cat([augment(torch.ones(4, 798, 128), generator) == 0 for _ in range(2)])
        assert len(hidden.flatten(1).unique(dim=0)) == 8

    @pytest.mark.parametrize("policy", POLICIES)
    def test_the_same_seed_gives_the_same(self, device: str, policy: Any) -> None:
        augment, features = SpecAugment(policy, p=1.0), noise(4, 200, 64).to(device)
        first, again, other = (augment(features, generator=seeded(seed, device)) for seed in (7, 7, 8))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_without_a_generator_it_draws_from_torch(self) -> None:
        first, again = [(torch.manual_seed(3), SpecAugment()(noise(2, 160, 48)))[1] for _ in range(2)]
        assert torch.equal(first, again)

    @pytest.mark.usefixtures("bfloat16_by_default")
    def test_draws_are_as_fine_when_bfloat16_is_the_default(self) -> None:
        found = SpecAugment("LD")(noise(4, 798, 128), generator=seeded())
        torch.set_default_dtype(torch.float32)
        assert torch.equal(found, SpecAugment("LD")(noise(4, 798, 128), generator=seeded()))


class TestWarp:
    @pytest.mark.parametrize(
        ("origin", "goal"), [(10, 14), (10, 6), (10, 10), (4, 0), (15, 19)], ids=lambda frame: str(frame)
    )
    def test_is_linear_on_either_side_of_the_moved_frame(self, origin: int, goal: int) -> None:
        features = noise(2, 20, 3)
        warped = _warp(features, torch.tensor([[origin], [7]]), torch.tensor([[goal], [9]]))
        for clip, expected, (start, end) in zip(warped, features, [(origin, goal), (7, 9)], strict=True):
            knots = {0: 0, 19: 19, end: start}
            source = np.interp(np.arange(20), sorted(knots), [knots[frame] for frame in sorted(knots)])
            for column in range(3):
                oracle = np.interp(source, np.arange(20), expected[:, column])
                np.testing.assert_allclose(clip[:, column], oracle, rtol=0, atol=1e-5)

    def test_moves_a_frame_by_up_to_the_distance(self) -> None:
        bound, frames = 6, 40
        ramp = torch.arange(float(frames))[None, :, None].expand(4000, frames, 1)
        augment = SpecAugment("LB", time_warp=bound, freq_masks=0, time_masks=0)
        moved = (ramp - augment(ramp, generator=seeded()))[:, :, 0]  # the frame itself moves farthest
        farthest, at = moved.abs().max(1)
        distances = moved.gather(1, at[:, None]).round().long()[:, 0]
        torch.testing.assert_close(farthest, distances.abs().float(), rtol=0, atol=1e-4)
        counts = torch.bincount(distances + bound)
        assert len(counts) == 2 * bound + 1
        assert chisquare(counts).pvalue > 1e-3
        origins = (at - distances)[distances != 0]
        assert chisquare(torch.bincount(origins)[bound : frames - bound]).pvalue > 1e-3
        assert (origins.min(), origins.max()) == (bound, frames - bound - 1)

    def test_leaves_a_sample_that_is_not_augmented_bit_by_bit(self) -> None:
        features = noise(8, 798, 4)
        assert torch.equal(SpecAugment("LD", p=0.0, freq_width=4)(features), features)


class TestModule:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_policy_has_the_numbers_of_the_paper(self, policy: Any) -> None:
        augment = SpecAugment(policy)
        names = ("time_warp", "freq_width", "freq_masks", "time_width", "p", "time_masks")
        assert tuple(getattr(augment, name) for name in names) == POLICIES[policy]

    def test_numbers_given_replace_the_policys(self) -> None:
        augment = SpecAugment("LD", p=0.5, freq_masks=0, time_width=9, time_warp=0)
        assert (augment.p, augment.freq_masks, augment.time_width, augment.time_warp) == (0.5, 0, 9, 0)
        assert (augment.freq_width, augment.time_masks) == (27, 2)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_never_changes_its_input(self, policy: Any) -> None:
        features = noise(4, 200, 64)
        before = features.clone()
        for seed in range(5):
            augmented = SpecAugment(policy)(features, generator=seeded(seed))
            augmented.zero_()
            assert torch.equal(features, before)

    def test_eval_returns_the_input(self) -> None:
        features = noise(2, 10, 5)
        assert SpecAugment().eval()(features) is features

    @pytest.mark.parametrize("policy", ["LD", "icbhi_ast_sup"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_shape_type_and_device(self, device: str, policy: Any, dtype: torch.dtype) -> None:
        features = noise(3, 200, 64, dtype=dtype).to(device)
        augmented = SpecAugment(policy)(features, generator=seeded(device=device))
        assert (augmented.shape, augmented.dtype, augmented.device) == (features.shape, dtype, features.device)
        assert augmented.isfinite().all()

    @pytest.mark.parametrize("policy", ["LD", "icbhi_ast_sup"])
    @pytest.mark.parametrize("gate", ["uniform", "normal-batch"])
    def test_asks_the_device_for_no_value(self, policy: Any, gate: Any) -> None:
        features = torch.empty(3, 200, 64, device="meta")  # has none to give
        assert SpecAugment(policy, gate=gate)(features).shape == (3, 200, 64)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("policy", ["LD", "icbhi_ast_sup"])
    @pytest.mark.parametrize("gate", ["uniform", "normal-batch"])
    def test_never_waits_for_the_gpu(self, policy: Any, gate: Any) -> None:
        features = noise(3, 200, 64).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            augmented = SpecAugment(policy, gate=gate, fill=-14.47)(features, generator=seeded(device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert augmented.isfinite().all()

    @pytest.mark.parametrize("fill", ["zero", -14.47])
    def test_comes_back_from_its_description(self, fill: Any) -> None:
        augment = SpecAugment("SM", p=0.7, fill=fill, gate="normal-batch", time_warp=3)
        again = build(describe(augment), Transform, "augment")
        features = noise(4, 100, 64)
        assert torch.equal(augment(features, generator=seeded()), again(features, generator=seeded()))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": "LS"}, "policy must be one of 'LB', .*, got 'LS'"),
            ({"fill": "max"}, "fill must be 'mean', 'zero' or a finite number, got 'max'"),
            ({"fill": math.inf}, "fill must be 'mean', 'zero' or a finite number, got inf"),
            ({"gate": True}, "gate must be one of 'uniform', 'normal', 'normal-batch', got True"),
            ({"p": 1.5}, r"p must lie in \[0, 1\], got 1.5"),
            ({"p": math.nan}, r"p must lie in \[0, 1\], got nan"),
            ({"time_width": -1}, "time_width must not be negative, got -1"),
        ],
        ids=lambda value: "" if isinstance(value, str) else str(value),
    )
    def test_refuses_arguments_without_a_meaning(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SpecAugment(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"freq_width": 65}, "freq_width is 65, but the features have 64 bins; pass SpecAugment a freq_width"),
            ({"time_width": 41}, "time_width is 41, but the features have 40 frames; pass SpecAugment a time_width"),
            ({"time_warp": 20}, "time_warp is 20, but the features have 40 frames; pass SpecAugment a time_warp"),
        ],
        ids=["freq_width", "time_width", "time_warp"],
    )
    def test_says_which_bound_does_not_fit(self, options: Any, message: str) -> None:
        fitting = {"freq_width": 64, "time_width": 40, "time_warp": 19}
        assert SpecAugment(**fitting)(noise(1, 40, 64)).shape == (1, 40, 64)
        with pytest.raises(ValueError, match=message):
            SpecAugment(**{**fitting, **options})(noise(1, 40, 64))


def rolling(**arguments: Any) -> SpecAugment:
    """Nothing but the roll."""
    return SpecAugment("LB", time_warp=0, freq_masks=0, time_masks=0, roll=True, **arguments)


def test_a_roll_moves_every_sample_around_its_end() -> None:
    features = noise(64, 10, 3)
    rolled = rolling()(features, generator=seeded())
    shifts = []
    for before, after in zip(features, rolled, strict=True):
        fitting = [shift for shift in range(10) if torch.equal(before.roll(shift, 0), after)]
        assert len(fitting) == 1
        shifts += fitting
    assert set(shifts) == set(range(10))


def test_a_roll_obeys_the_gate_and_the_mode() -> None:
    features = noise(400, 10, 3)
    kept = (rolling(p=0.4)(features, generator=seeded()) == features).all((1, 2)).float().mean()
    assert 0.57 < kept < 0.73  # 0.6 are not augmented, and a tenth of the others not moved
    assert rolling().eval()(features) is features


def test_without_a_roll_the_draws_are_what_they_were() -> None:
    features = noise(4, 300, 64)
    plain, rolled = (SpecAugment("icbhi_sup", roll=roll)(features, generator=seeded()) for roll in (False, True))
    assert torch.equal(plain, SpecAugment("icbhi_sup")(features, generator=seeded()))
    assert not torch.equal(plain, rolled)
