"""The Inception-residual branch: its size, its parts written out, its inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from respiro.component import build, describe
from respiro.models.inception import InceptionBlock, InceptionResidual, TokenAttention

SMALL = {"widths": (8, 16), "num_features": 24, "num_heads": 4, "dropout": (0.1, 0.1)}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, 3.74e6), ({"widths": (32, 64, 128, 256)}, 1.07e6)],
    ids=["64 to 512", "32 to 256"],
)
def test_the_number_of_parameters(arguments: dict[str, tuple[int, ...]], expected: float) -> None:
    assert parameters(InceptionResidual(**arguments)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("frames", [154, 591], ids=["4 s", "15.36 s"])
def test_both_published_sizes_run(frames: int) -> None:
    model = InceptionResidual(widths=(8, 16, 32, 64), num_features=512).eval()
    assert model(torch.randn(2, frames, 124)).shape == (2, 512)


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (100, 7)], ids=["smallest", "odd", "long"])
def test_any_size_runs(size: tuple[int, int]) -> None:
    model = InceptionResidual(**SMALL).eval()
    assert model(torch.randn(3, *size)).shape == (3, model.num_features)
    assert model(torch.randn(1, *size)).isfinite().all()


def conv(parts: nn.Sequential, x: Tensor, rows: slice = slice(None), relu: bool = True) -> Tensor:
    """Convolution and batch norm in eval mode, from their parameters alone."""
    weights, norm = parts[0].weight[rows], parts[1]
    y = F.conv2d(x, weights, padding=(weights.shape[2] // 2, weights.shape[3] // 2))
    mean, var, gain, shift = (
        values[rows].view(1, -1, 1, 1) for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    y = (y - mean) / (var + norm.eps).sqrt() * gain + shift
    return y.clamp(min=0) if relu else y


def randomise(module: nn.Module) -> None:
    """Give batch norms statistics that matter."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.running_mean, norm.weight, norm.bias):
                nn.init.normal_(values)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)


def test_a_block_is_four_branches_and_a_shortcut() -> None:
    """1x1; 1x1 -> 3x3; 1x1 -> 1x5 -> 5x1; max 3 -> 1x1; joined by 1x1; plus 1x1."""
    torch.manual_seed(0)
    block = InceptionBlock(6, 16).eval().double()
    randomise(block)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    point = conv(block.reduce, x, slice(0, 4))
    square = conv(block.square, conv(block.reduce, x, slice(4, 8)))
    cross = conv(block.cross[1], conv(block.cross[0], conv(block.reduce, x, slice(8, 12))))
    around = F.pad(x, (1, 1, 1, 1), value=float("-inf")).unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2))
    pooled = conv(block.pool[1], around)
    joined = conv(block.join, torch.cat([point, square, cross, pooled], 1), relu=False)
    torch.testing.assert_close(block(x), joined + conv(block.shortcut, x, relu=False))
    assert block.cross[0][0].kernel_size == (1, 5)
    assert block.cross[1][0].kernel_size == (5, 1)


def test_attention_over_tokens_is_attention_written_out() -> None:
    torch.manual_seed(0)
    channels, heads, tokens = 12, 3, 5
    module = TokenAttention(channels, heads).double()
    x = torch.randn(2, tokens, channels, dtype=torch.float64)
    weights, bias = module.attention.in_proj_weight, module.attention.in_proj_bias
    query, key, value = (F.linear(x, w, b) for w, b in zip(weights.chunk(3), bias.chunk(3), strict=True))
    attended = torch.zeros_like(x)
    width = channels // heads
    for clip in range(2):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[clip, :, part] @ key[clip, :, part].T / width**0.5
            attended[clip, :, part] = scores.softmax(1) @ value[clip, :, part]
    summed = x + F.linear(attended, module.attention.out_proj.weight, module.attention.out_proj.bias)
    normed = (summed - summed.mean(2, keepdim=True)) / (summed.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(module(x), normed.mean(1) + normed.amax(1))


def test_the_tokens_are_means_over_time_and_over_frequency() -> None:
    """The order of the moments does not matter to the frequencies' tokens, and neither kind has positions."""
    torch.manual_seed(0)
    model = InceptionResidual(**SMALL).eval()
    seen: dict[str, Tensor] = {}
    for name in ("over_frequency", "over_time"):
        getattr(model, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model.blocks.register_forward_hook(lambda *args: seen.update(map=args[2]))
    model(torch.randn(2, 20, 12))
    last = seen["map"]  # (B, C, F, T): features came as (B, T, F)
    assert last.shape == (2, 16, 3, 5)
    torch.testing.assert_close(seen["over_frequency"], torch.stack([last[:, :, f].mean(2) for f in range(3)], 1))
    torch.testing.assert_close(seen["over_time"], torch.stack([last[..., t].mean(2) for t in range(5)], 1))


def test_dropout_drops_whole_maps_at_the_given_rates() -> None:
    rates = [part.p for part in InceptionResidual().modules() if isinstance(part, nn.Dropout2d)]
    assert rates == [0.10, 0.15, 0.20, 0.25]


def test_batched_is_one_by_one() -> None:
    model = InceptionResidual(**SMALL).eval()
    x = torch.randn(4, 30, 20)
    torch.testing.assert_close(model(x), torch.cat([model(clip[None]) for clip in x]), rtol=1e-4, atol=1e-5)


def test_it_survives_a_checkpoint() -> None:
    model = InceptionResidual(**SMALL).eval()
    again = build(describe(model), InceptionResidual, "backbone").eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 16, 16)
    assert torch.equal(again(x), model(x))


def test_every_parameter_is_trained() -> None:
    model = InceptionResidual(**SMALL)
    model(torch.randn(4, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (8, 18)}, r"widths must be divisible by 4, got \(8, 18\)"),
        ({"widths": ()}, "widths must be divisible by 4"),
        ({"num_heads": 5}, "num_heads must divide the last width, 16, got 5"),
        ({"dropout": (0.1,)}, r"dropout must have a number for each of 2 widths, got \(0.1,\)"),
    ],
    ids=["width", "no width", "heads", "dropout"],
)
def test_numbers_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InceptionResidual(**(SMALL | arguments))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 3, 16), "features have 3 frames of 16 bins, .* needs at least 4 of each"), ((2, 16), "shape .B, T, F.")],
    ids=["short", "two dimensions"],
)
def test_features_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InceptionResidual(**SMALL)(torch.zeros(shape))
