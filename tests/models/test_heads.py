from __future__ import annotations

import copy
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from respiro.component import Component, build, describe
from respiro.models.heads import CosineHead, KNNHead, LinearHead, Projector


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x: Tensor, y: Tensor) -> float:
    """Entry by entry."""
    products, lengths = 0.0, [0.0, 0.0]
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        products, lengths = products + a * b, [lengths[0] + a * a, lengths[1] + b * b]
    return products / math.sqrt(lengths[0] * lengths[1])


class TestCosineHead:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_is_the_scaled_cosine_of_each_class(self, dtype: torch.dtype) -> None:
        head, z = CosineHead(6, 4, scale=12.0).to(dtype), noise(5, 6).to(dtype)
        expected = [[cosine(row, direction) for direction in head.weight] for row in z]
        cosines = head.cosines(z)
        assert cosines.dtype == dtype
        torch.testing.assert_close(cosines, torch.tensor(expected, dtype=dtype))
        torch.testing.assert_close(head(z), 12 * cosines)

    def test_neither_length_matters(self) -> None:
        head, z = CosineHead(6, 4).double(), noise(5, 6)
        expected = head(z)
        head.weight.data *= torch.tensor([[1e-6], [3.0], [1e6], [1e150]], dtype=torch.float64)
        torch.testing.assert_close(head(z * 1e3), expected)

    def test_cosines_stay_within_their_range(self) -> None:
        head = CosineHead(300, 4)
        own = head.cosines(torch.cat([head.weight, -head.weight]) * 7).detach()
        torch.testing.assert_close(own[:4].diagonal(), torch.ones(4))
        assert own.abs().max() <= 1 + 1e-5

    def test_a_zero_embedding_has_no_direction(self) -> None:
        head, z = CosineHead(6, 4), torch.zeros(2, 6, requires_grad=True)
        logits = head(z)
        logits.sum().backward()
        assert not logits.any()
        assert z.grad is not None
        assert not z.grad.any()
        assert head.weight.grad is not None
        assert head.weight.grad.isfinite().all()

    def test_gradient_is_right(self) -> None:
        head, z = CosineHead(6, 4).double(), noise(3, 6).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z, w: torch.func.functional_call(head, {"weight": w}, (z,)), (z, head.weight)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_computes_in_float32_under_autocast(self, dtype: torch.dtype) -> None:
        head, z = CosineHead(64, 4), (noise(5, 64) * 100).to(dtype)  # the squares would be infinite in float16
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(z)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, head(z.float()))

    def test_half_precision_weights(self) -> None:
        head, z = CosineHead(64, 4), noise(5, 64)
        expected = head.cosines(z.float())
        torch.testing.assert_close(head.half().cosines(z.half()), expected, rtol=0, atol=2e-3)

    def test_with_cross_entropy_it_gives_the_reference_values(self, golden: Path) -> None:
        """NormFace at 37, of which the file holds the loss of each sample."""
        expected = np.load(golden / "qlung" / "loss_icbhi4.npz")
        head = CosineHead(8, 4).double()
        head.weight.data = torch.from_numpy(expected["weight"])
        logits = head(torch.from_numpy(expected["x"]))
        np.testing.assert_allclose(logits.detach(), expected["ce_logits"], rtol=1e-9, atol=1e-11)
        losses = nn.functional.cross_entropy(logits, torch.from_numpy(expected["label"]), reduction="none")
        np.testing.assert_allclose(losses.detach(), expected["l_ce"], rtol=1e-9, atol=1e-11)

    def test_comes_back_from_its_description(self) -> None:
        head = CosineHead(6, 4, scale=5.0)
        again = build(describe(head), CosineHead, "head")
        again.load_state_dict(head.state_dict())
        z = noise(3, 6).float()
        assert torch.equal(again(z), head(z))
        assert (again.in_features, again.num_classes, again.scale) == (6, 4, 5.0)

    def test_an_empty_batch(self) -> None:
        assert CosineHead(6, 4)(torch.zeros(0, 6)).shape == (0, 4)

    @pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
    def test_refuses_a_scale_without_meaning(self, scale: float) -> None:
        with pytest.raises(ValueError, match=f"scale must be positive and finite, got {scale}"):
            CosineHead(6, 4, scale)


class TestLinearHead:
    @pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer-norm"])
    def test_cosines_are_those_of_its_weights(self, layer_norm: bool) -> None:
        head, z = LinearHead(6, 4, layer_norm=layer_norm).double(), noise(5, 6)
        before = nn.functional.layer_norm(z, (6,)) if layer_norm else z
        expected = [[cosine(row, direction) for direction in head.linear.weight] for row in before]
        torch.testing.assert_close(head.cosines(z), torch.tensor(expected, dtype=torch.float64))

    def test_cosines_leave_the_bias_out(self) -> None:
        head, z = LinearHead(6, 4), noise(5, 6).float()
        expected = head.cosines(z)
        head.linear.bias.data += 10
        assert torch.equal(head.cosines(z), expected)

    def test_cosines_are_in_float32_under_autocast(self) -> None:
        head, z = LinearHead(6, 4), noise(5, 6).float()
        with torch.autocast("cpu", torch.bfloat16):
            cosines = head.cosines(z)
        assert cosines.dtype == torch.float32
        assert torch.equal(cosines, head.cosines(z))


class TestProjector:
    def test_without_batch_norm_gives_the_reference_projections(self, golden: Path) -> None:
        """Weights as the README of the reference vectors makes them from their key."""
        expected = np.load(golden / "scl" / "projector.npz")
        projector = Projector(512, out_features=128, batch_norm=False)
        state = {}
        for ours, key, total in zip(
            projector.state_dict(), expected["weight_keys"], expected["weight_sums"], strict=True
        ):
            shape = projector.state_dict()[ours].shape
            x = np.random.default_rng(zlib.crc32(f"dev:projector.{key}".encode())).standard_normal(shape)
            state[ours] = torch.from_numpy((0.1 * x if x.ndim == 1 else x * np.sqrt(2 / x.shape[1])).astype(np.float32))
            assert state[ours].double().sum().item() == pytest.approx(float(total), abs=1e-6), key
        projector.load_state_dict(state)
        with torch.no_grad():
            out = projector(torch.from_numpy(expected["x"]))
        np.testing.assert_allclose(out, expected["out"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(nn.functional.normalize(out, dim=1), expected["out_normalised"], rtol=0, atol=1e-5)

    def test_without_batch_norm_has_the_published_size(self) -> None:
        parameters = Projector(512, out_features=128, batch_norm=False).parameters()
        assert sum(parameter.numel() for parameter in parameters) == 328_320

    def test_with_batch_norm_keeps_the_names_that_checkpoints_hold(self) -> None:
        names = {f"layers.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")}
        names |= {f"layers.1.{kind}" for kind in ("running_mean", "running_var", "num_batches_tracked")}
        assert set(Projector(4).state_dict()) == names

    @pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch-norm"])
    def test_comes_back_from_its_description(self, batch_norm: bool) -> None:
        projector = Projector(6, 5, 4, batch_norm).eval()
        again = build(describe(projector), Projector, "projector").eval()
        again.load_state_dict(projector.state_dict())
        z = noise(3, 6).float()
        assert torch.equal(again(z), projector(z))
        assert (again.in_features, again.num_features) == (6, 4)


def filled(train: Tensor, labels: Tensor, num_classes: int, neighbors: int) -> KNNHead:
    head = KNNHead(train.shape[1], num_classes, len(train), neighbors).to(train.dtype)
    head.remember(train, labels)
    return head


class TestKNNHead:
    @pytest.mark.parametrize("neighbors", [1, 7, 20, 60], ids=lambda k: f"k={k}")
    def test_weighs_the_votes_that_scikit_learn_counts(self, neighbors: int) -> None:
        labels = torch.tensor([0] * 35 + [1] * 15 + [2] * 8 + [3] * 2)
        train, test = noise(60, 9) + labels[:, None] / 4, noise(40, 9, seed=1)
        oracle = KNeighborsClassifier(neighbors, metric="cosine", algorithm="brute").fit(train.numpy(), labels.numpy())
        votes = oracle.predict_proba(test.numpy()) / labels.bincount().numpy()
        share = votes / votes.sum(axis=1, keepdims=True)
        logits = filled(train, labels, 4, neighbors)(test)
        smoothed = (neighbors * share + 0.25) / (neighbors + 1)
        np.testing.assert_allclose(logits, np.log(smoothed), rtol=0, atol=1e-9)
        np.testing.assert_array_equal(logits.argmax(1), share.argmax(axis=1))

    def test_all_samples_as_neighbors_vote_alike(self) -> None:
        logits = filled(noise(10, 4), torch.tensor([0] * 8 + [1] * 2), 2, 10)(noise(3, 4, seed=1))
        torch.testing.assert_close(logits, torch.full_like(logits, math.log(0.5)))

    def test_a_class_without_samples_gets_the_least(self) -> None:
        logits = filled(noise(6, 4), torch.tensor([0, 0, 0, 2, 2, 2]), 3, 6)(noise(3, 4, seed=1))
        assert logits.isfinite().all()
        assert (logits.argmin(1) == 1).all()
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(3, dtype=torch.float64))

    def test_of_equally_near_samples_the_first_count(self) -> None:
        train = torch.ones(30, 5)
        labels = torch.tensor([1, 2] + [0] * 28)
        shares = filled(train, labels, 3, 2)(torch.ones(4, 5)).exp()
        assert (shares[:, 1:] > shares[:, :1]).all()
        assert torch.equal(shares[:, 1], shares[:, 2])

    def test_a_zero_embedding_gives_a_finite_answer(self) -> None:
        train = noise(8, 4)
        train[3] = 0
        assert filled(train, torch.tensor([0, 1] * 4), 2, 3)(torch.zeros(2, 4)).isfinite().all()

    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    def test_length_does_not_matter(self, scale: float) -> None:
        train, labels, test = noise(30, 6), torch.arange(30) % 3, noise(9, 6, seed=1)
        torch.testing.assert_close(filled(train, labels, 3, 5)(test), filled(train * scale, labels, 3, 5)(test * scale))

    def test_computes_in_float32_under_autocast(self) -> None:
        head, test = filled(noise(40, 8).float(), torch.arange(40) % 4, 4, 5), noise(20, 8, seed=1).float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(test)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, head(test))

    def test_has_nothing_to_train_and_changes_no_input(self) -> None:
        train, labels = noise(12, 4), torch.arange(12) % 2
        before = train.clone()
        head = filled(train, labels, 2, 3)
        assert not list(head.parameters())
        test = noise(5, 4, seed=1)
        kept = test.clone()
        head(test)
        assert torch.equal(train, before)
        assert torch.equal(test, kept)

    def test_what_it_remembers_is_in_the_state(self) -> None:
        head = filled(noise(12, 4).float(), torch.arange(12) % 2, 2, 3)
        again: Any = build(describe(head), Component, "head")
        again.load_state_dict(copy.deepcopy(head.state_dict()))
        test = noise(5, 4, seed=1).float()
        assert torch.equal(again(test), head(test))
        assert (again.in_features, again.num_classes) == (4, 2)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_never_waits_for_the_gpu(self) -> None:
        head, test = filled(noise(40, 8), torch.arange(40) % 4, 4, 5), noise(20, 8, seed=1)
        expected = head(test)
        head, test = head.cuda(), test.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = head(test)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(logits.cpu(), expected)

    def test_empty_it_says_so(self) -> None:
        with pytest.raises(ValueError, match=r"no training samples; give them to remember\(embeddings, labels\)"):
            KNNHead(4, 2, 12, 3)(torch.zeros(1, 4))

    @pytest.mark.parametrize("neighbors", [0, 13])
    def test_refuses_numbers_of_neighbors_without_a_meaning(self, neighbors: int) -> None:
        with pytest.raises(ValueError, match=f"neighbors must be between 1 and num_samples, 12, got {neighbors}"):
            KNNHead(4, 2, 12, neighbors)

    @pytest.mark.parametrize(
        ("train", "labels", "message"),
        [
            (noise(5, 4), torch.zeros(6).long(), r"embeddings must have shape \(6, 4\), got \(5, 4\)"),
            (noise(6, 3), torch.zeros(6).long(), r"embeddings must have shape \(6, 4\), got \(6, 3\)"),
            (noise(6, 4).log(), torch.zeros(6).long(), "embeddings must be finite, but row 0 is not"),
            (noise(6, 4), torch.zeros(6), r"labels must be int64 of shape \(6,\), got torch.float32 of shape \(6,\)"),
            (noise(6, 4), torch.tensor([0, 1, 2, 0, 1, 1]), "labels must be 0 to 1, got 0 to 2"),
            (noise(6, 4), torch.tensor([0, 1, -1, 0, 1, 1]), "labels must be 0 to 1, got -1 to 1"),
        ],
        ids=["rows", "features", "nan", "float-labels", "no-such-class", "unknown"],
    )
    def test_refuses_to_remember_what_does_not_fit(self, train: Tensor, labels: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            KNNHead(4, 2, 6, 3).remember(train, labels)
