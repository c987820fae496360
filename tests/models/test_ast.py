"""The architecture of the AST; its published weights are tested beside the code that loads them."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.component import build, describe
from respiro.models import AST


@pytest.fixture(scope="module")
def ast() -> AST:
    torch.manual_seed(0)
    return AST("tiny224", num_mel_bins=48, frames=98, stride=10).eval()


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "width", "millions"),
    [("tiny224", 192, 5.5), ("small224", 384, 21.6), ("base224", 768, 85.8), ("base384", 768, 86.0)],
)
def test_sizes(size: str, width: int, millions: float) -> None:
    """Parameters of the published system: 85,984,512 at base384 and 8 s."""
    with torch.device("meta"):
        ast = AST(size)  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in ast.parameters())
    assert (ast.grid, ast.num_features) == ((12, 79), width)
    assert count / 1e6 == pytest.approx(millions, rel=0.05)
    if size == "base384":
        assert count == 85_984_512


@pytest.mark.parametrize(
    ("bins", "frames", "stride", "grid"),
    [
        (128, 798, 10, (12, 79)),
        (128, 498, 10, (12, 49)),
        (128, 1024, 10, (12, 101)),
        (64, 98, 16, (4, 6)),
        (40, 100, [8, 12], (4, 8)),
        (16, 16, 10, (1, 1)),
    ],
    ids=["8-s", "5-s", "audioset", "no-overlap", "two-strides", "one-patch"],
)
def test_any_spectrogram(bins: int, frames: int, stride: int | list[int], grid: tuple[int, int]) -> None:
    ast = AST("tiny224", bins, frames, stride).eval()
    with torch.inference_mode():
        tokens = ast.embed_patches(features(1, frames, bins))
        assert ast(features(1, frames, bins)).shape == (1, ast.num_features)
    assert ast.grid == grid
    assert tokens.shape == (1, grid[0] * grid[1], ast.num_features)


def test_a_token_is_its_patch(ast: AST) -> None:
    """Token f * grid[1] + t comes from bins 10 f to 10 f + 15 of frames 10 t to 10 t + 15."""
    x = features(2, 98, 48)
    tokens = ast.embed_patches(x)
    proj = ast.v.patch_embed.proj
    for f, t in [(0, 0), (1, 7), (3, 2)]:
        patch = x[:, 10 * t : 10 * t + 16, 10 * f : 10 * f + 16].transpose(1, 2)
        expected = torch.einsum("bft,dft->bd", patch, proj.weight[:, 0]) + proj.bias
        torch.testing.assert_close(tokens[:, f * ast.grid[1] + t], expected, rtol=1e-4, atol=1e-5)


def test_the_transformer_as_its_equations(ast: AST) -> None:
    """Pre-norm blocks with softmax attention written out; the embedding is the mean of the two class tokens."""
    x = features(2, 98, 48)
    v = ast.v
    tokens = torch.cat([v.cls_token.expand(2, -1, -1), v.dist_token.expand(2, -1, -1), ast.embed_patches(x)], 1)
    z = tokens + v.pos_embed
    for block in v.blocks:
        heads = block.attn.num_heads
        q, k, value = block.attn.qkv(block.norm1(z)).chunk(3, -1)
        q, k, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, value))
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        z = z + block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
        z = z + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(z))))
    z = F.layer_norm(z, z.shape[-1:], v.norm.weight, v.norm.bias, eps=1e-6)
    torch.testing.assert_close(ast(x), (z[:, 0] + z[:, 1]) / 2, rtol=1e-4, atol=1e-5)


def test_a_batch_is_its_samples(ast: AST) -> None:
    x = features(3, 98, 48)
    together = ast(x)
    for one, expected in zip(x, together, strict=True):
        torch.testing.assert_close(ast(one[None])[0], expected, rtol=1e-4, atol=1e-5)


def test_a_description_and_a_state_dict_make_the_same_again(ast: AST) -> None:
    again = build(describe(ast), AST, "backbone").eval()
    again.load_state_dict(ast.state_dict())
    torch.testing.assert_close(again(features(1, 98, 48)), ast(features(1, 98, 48)), rtol=0, atol=0)


def test_bfloat16(ast: AST) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        low = ast(features(2, 98, 48))
    torch.testing.assert_close(low.float(), ast(features(2, 98, 48)), rtol=0.1, atol=0.1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_gives_the_same() -> None:
    torch.manual_seed(0)
    ast = AST("tiny224", num_mel_bins=32, frames=48, stride=16)
    del ast.v.blocks[2:]  # all are alike, and each is compiled anew
    x = features(2, 48, 32)
    plain = ast(x)
    plain.square().sum().backward()
    expected = ast.v.patch_embed.proj.weight.grad.clone()
    ast.zero_grad()
    names = list(ast.state_dict())
    ast.compile()
    compiled = ast(x)
    compiled.square().sum().backward()
    assert list(ast.state_dict()) == names
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ast.v.patch_embed.proj.weight.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "base"}, "size must be one of 'tiny224', 'small224', 'base224', 'base384', got 'base'"),
        ({"pos_embed_mode": "swapped"}, "pos_embed_mode must be one of 'correct', 'reference'"),
        ({"stride": 0}, "stride must be one or two whole numbers of at least 1, got 0"),
        ({"stride": [1, 2, 3]}, r"got \[1, 2, 3\]"),
        ({"stride": 10.0}, "whole numbers of at least 1, got 10.0"),
        ({"frames": 15}, "128 mel bins and 15 frames is smaller than one patch of 16 by 16"),
        ({"num_mel_bins": 8}, "8 mel bins and 798 frames is smaller than one patch"),
    ],
    ids=["size", "mode", "stride", "strides", "half-stride", "frames", "bins"],
)
def test_what_has_no_meaning_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AST(**{"size": "tiny224"} | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 97, 48), (2, 48, 98), (2, 1, 98, 48)], ids=["frames", "transposed", "image"])
def test_features_of_another_size_are_refused(ast: AST, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"features must have shape \(B, 98, 48\), got .*KaldiFbank\(num_mel_bins=48\)"
    ):
        ast(torch.zeros(shape))
