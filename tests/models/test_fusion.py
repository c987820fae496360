"""What joins the branches: each combination against its equation, and what the equations are meant to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from respiro.component import Backbone, build, describe
from respiro.models import CNN6, InceptionResidual, LinearHead, SpectrogramFusion

COMBINATIONS = ["linear", "concat", "mean", "learned", "gated", "product"]


def branch(num_features: int = 6) -> InceptionResidual:
    return InceptionResidual((8, 8), num_features, num_heads=2, dropout=(0.0, 0.0), embedding_dropout=0.0)


def fusion(combination: str = "linear", sizes: tuple[int, ...] = (6, 4), num_features: int = 5) -> SpectrogramFusion:
    torch.manual_seed(0)
    branches: list[Backbone] = [branch(size) for size in sizes]
    model = SpectrogramFusion(branches, [12] * len(sizes), combination, num_features)  # type: ignore[arg-type]
    for parameter in model.parameters():  # zeros would hide what a bias or a gate does
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return model.eval()


def embeddings(sizes: tuple[int, ...] = (6, 4), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, size, generator=generator, dtype=dtype) for size in sizes]


def written_out(model: SpectrogramFusion, parts: list[Tensor], sample: int) -> Tensor:
    """The equation of the combination for one sample, a branch at a time."""
    own = [part[sample] for part in parts]
    if model.combination == "product":
        return torch.cat(own)
    if model.combination == "mean":
        return torch.cat(own) / len(own)
    if model.combination == "concat":
        return (model.projections[0].weight @ torch.cat(own) + model.bias).clamp(min=0)
    unit = [e / e.norm() for e in own]
    shares = torch.full((len(own),), 1 / len(own))
    if model.combination == "learned":
        shares = model.balance.exp() / model.balance.exp().sum()
    if model.combination == "gated":
        gates = model.gate.weight @ torch.cat(unit) + model.gate.bias
        shares = gates.exp() / gates.exp().sum()
    total = model.bias.clone()
    for share, projection, direction in zip(shares, model.projections, unit, strict=True):
        total = total + share * (projection.weight @ direction)
    return total.clamp(min=0)


@pytest.mark.parametrize("sizes", [(6, 4), (3, 3, 8), (7,)], ids=["two", "three", "one"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_each_combination_is_its_equation(combination: str, sizes: tuple[int, ...]) -> None:
    model, parts = fusion(combination, sizes), embeddings(sizes)
    expected = torch.stack([written_out(model, parts, sample) for sample in range(3)])
    torch.testing.assert_close(model.combine(parts), expected)
    assert expected.shape == (3, model.num_features)


def test_the_published_size_has_the_number_of_parameters_of_the_specification() -> None:
    model = SpectrogramFusion([InceptionResidual(), InceptionResidual()], [124, 124])
    head = LinearHead(model.num_features, 7)
    total = sum(parameter.numel() for part in (model, head) for parameter in part.parameters())
    assert total == pytest.approx(8.02e6, rel=0.01)


@pytest.mark.parametrize("combination", ["linear", "learned", "gated"])
def test_the_length_of_an_embedding_has_no_effect(combination: str) -> None:
    model, (one, other) = fusion(combination), embeddings()
    torch.testing.assert_close(model.combine([10 * one, other]), model.combine([one, other]))


def test_the_length_of_an_embedding_has_an_effect_on_a_concatenation() -> None:
    model, (one, other) = fusion("concat"), embeddings()
    assert not torch.allclose(model.combine([10 * one, other]), model.combine([one, other]))


def test_with_equal_projections_the_branches_can_change_places() -> None:
    model, (one, other) = fusion(sizes=(6, 6)), embeddings((6, 6))
    model.projections[1].weight.data.copy_(model.projections[0].weight)
    torch.testing.assert_close(model.combine([one, other]), model.combine([other, one]))


def test_mean_and_product_are_those_of_a_head_on_each_branch() -> None:
    parts, head = embeddings(), LinearHead(10, 4)
    each = [part @ weight.T for part, weight in zip(parts, head.linear.weight.split([6, 4], dim=1), strict=True)]
    mean = head(fusion("mean").combine(parts))
    torch.testing.assert_close(mean, torch.stack([logits + head.linear.bias for logits in each]).mean(0))
    head.linear.bias.data.zero_()
    product = head(fusion("product").combine(parts)).softmax(1)
    scores = torch.stack([logits.softmax(1) for logits in each]).prod(0)
    torch.testing.assert_close(product, scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_an_embedding_of_zeros_gives_numbers_and_gradients(combination: str) -> None:
    model, (one, other) = fusion(combination), embeddings()
    one = torch.zeros_like(one).requires_grad_()
    z = model.combine([one, other])
    z.sum().backward()
    assert z.isfinite().all()
    assert one.grad is not None
    assert one.grad.isfinite().all()


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_gradient_reaches_every_branch_and_every_parameter(combination: str) -> None:
    model = fusion(combination).train()
    model(torch.randn(4, 16, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(any(p.grad.abs().sum() > 0 for p in part.parameters()) for part in model.branches)


def test_each_branch_sees_its_own_bins() -> None:
    model = SpectrogramFusion([branch(), CNN6()], bins=[12, 16]).eval()
    x = torch.randn(2, 16, 28)
    one, other = model.embed_branches(x)
    torch.testing.assert_close(one, model.branches[0](x[..., :12]))
    torch.testing.assert_close(other, model.branches[1](x[..., 12:]))


def test_equal_weights_at_first() -> None:
    torch.manual_seed(0)
    branches: list[Backbone] = [branch(6), branch(4)]
    linear, learned = SpectrogramFusion(branches, [12, 12]), SpectrogramFusion(branches, [12, 12], "learned")
    learned.load_state_dict(linear.state_dict(), strict=False)
    torch.testing.assert_close(learned.combine(embeddings()), linear.combine(embeddings()))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_it_survives_a_checkpoint(combination: str) -> None:
    model = fusion(combination)
    again = build(describe(model), SpectrogramFusion, "backbone").eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 16, 24)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_half_precision_is_close(combination: str, dtype: torch.dtype) -> None:
    model, parts = fusion(combination), embeddings()
    exact = model.combine(parts)
    with torch.autocast("cpu", dtype):
        mixed = model.combine([part.to(dtype) for part in parts])
    torch.testing.assert_close(mixed.float(), exact, rtol=0.05, atol=0.05)
    half = model.to(dtype).combine([part.to(dtype) for part in parts])
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([branch()], [12, 12]), r"bins must have a positive number for each of 1 branches, got \[12, 12\]"),
        (([], []), "bins must have a positive number for each of 0 branches"),
        (([branch()], [0]), r"got \[0\]"),
        (([branch()], [12], "sum"), "combination must be one of 'linear', 'concat', .* got 'sum'"),
    ],
    ids=["bins", "no branch", "no bins", "combination"],
)
def test_arguments_that_do_not_fit(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectrogramFusion(*arguments)  # type: ignore[arg-type]


def test_a_branch_that_does_not_say_its_size() -> None:
    with pytest.raises(TypeError, match="Identity has no num_features"):
        SpectrogramFusion([nn.Identity()], [12])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((branch(), [12]), "branches must be a list .* got InceptionResidual"), (([branch()], 12), "bins must be a list")],
    ids=["branches", "bins"],
)
def test_one_branch_is_a_list_too(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SpectrogramFusion(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 16, 23), (2, 24)], ids=["bins", "dimensions"])
def test_features_of_other_front_ends(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape .B, T, 24., \[12, 12\] bins for each branch, got"):
        fusion()(torch.zeros(shape))


@pytest.mark.parametrize("combination", ["linear", "learned", "gated", "concat"])
def test_the_result_is_large_enough_to_learn_from_at_first(combination: str) -> None:
    """Whatever the length of the embeddings, as unit vectors would shrink under torch's own initial weights."""
    torch.manual_seed(0)
    model = SpectrogramFusion([branch(512), branch(512)], [12, 12], combination)  # type: ignore[arg-type]
    z = model.combine([torch.randn(64, 512).relu(), torch.randn(64, 512).relu()])
    assert 0.1 < z.std() < 1.0
