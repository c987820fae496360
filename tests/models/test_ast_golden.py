"""AST against the released code, with weights that a recipe makes (tests/golden/patchmix/README.md)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.models.ast import AST
from respiro.models.heads import LinearHead

Vectors = Mapping[str, np.ndarray]

ADDED_ONE = ("norm1.weight", "norm2.weight")


def recipe(key: str, shape: Sequence[int]) -> Tensor:
    """The weights of a tensor of the released code."""
    draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(shape), dtype=np.float32)
    one = key.endswith(ADDED_ONE) or key in ("v.norm.weight", "mlp_head.0.weight")
    return torch.from_numpy(draw * np.float32(0.02)) + float(one)


def features(seed: int, *shape: int) -> Tensor:
    draw = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * 0.5
    return torch.from_numpy(draw).squeeze(1)


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Vectors:
    return np.load(golden / "patchmix" / "ast.npz")


@pytest.fixture(scope="module")
def audioset(golden: Path) -> dict[str, Tensor]:
    """The released file, with the recipe's weights."""
    shapes = json.loads((golden / "patchmix" / "keys_audioset_10_10_0.4593.json").read_text())
    return {key: recipe(key.removeprefix("module."), shape) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def hugging_face(golden: Path, audioset: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in the file of Hugging Face."""
    keymap = json.loads((golden / "patchmix" / "keymap_hf_to_original.json").read_text())
    tensors = {}
    for name, entry in sorted(keymap.items()):  # safetensors come in alphabetical order: key, query, value
        whole = audioset[f"module.{entry['orig']}"]
        part = entry["qkv_chunk"]
        tensors[name] = whole if part is None else whole.chunk(3)[part]
        assert list(tensors[name].shape) == entry["shape"]
    return tensors


def filled(frames: int, tensors: Mapping[str, Tensor]) -> AST:
    with torch.device("meta"):  # random weights are not worth the wait
        model = AST("base384", frames=frames)
    model.load_state_dict(model.convert_weights(tensors).encoder, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def model_8s(audioset: dict[str, Tensor]) -> AST:
    return filled(798, audioset)


@pytest.fixture(scope="module")
def model_10s(hugging_face: dict[str, Tensor]) -> AST:
    return filled(1024, hugging_face)


def assert_near(ours: Tensor, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=atol)


def test_both_audioset_files_fill_the_same_names_with_the_same_values(
    audioset: dict[str, Tensor], hugging_face: dict[str, Tensor], model_10s: AST
) -> None:
    one, other = model_10s.convert_weights(audioset), model_10s.convert_weights(hugging_face)
    assert one.encoder.keys() == other.encoder.keys() == model_10s.state_dict().keys()
    assert all(torch.equal(one.encoder[name], other.encoder[name]) for name in one.encoder)
    assert sorted(one.unused) == sorted(
        [f"module.v.{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")]
        + [f"module.mlp_head.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")]
    )
    assert sorted(other.unused) == [
        f"classifier.{layer}.{kind}" for layer in ("dense", "layernorm") for kind in ("bias", "weight")
    ]


@torch.no_grad()
def test_features_and_logits_of_audioset(vectors: Vectors, audioset: dict[str, Tensor], model_10s: AST) -> None:
    head = LinearHead(768, 527, layer_norm=True).eval()
    own = {"norm": "module.mlp_head.0", "linear": "module.mlp_head.1"}
    head.load_state_dict(
        {name: audioset[f"{own[name.split('.')[0]]}.{name.split('.')[1]}"] for name in head.state_dict()}
    )
    embedding = model_10s(features(int(vectors["x1024_seed"]), 1, 1, 1024, 128))
    assert_near(embedding, vectors["feat1024"], 1e-4)
    assert_near(head(embedding), vectors["logits1024"], 1e-4)
    assert_near(head(embedding), vectors["hf_logits1024"], 5e-4)  # their layer norm has another epsilon, 1e-12


@torch.no_grad()
def test_features_of_8_s(vectors: Vectors, model_8s: AST) -> None:
    tokens = model_8s.embed_patches(features(43, 2, 1, 798, 128))
    assert_near(tokens[..., :8], vectors["patch_tokens_first8dims"], 1e-6)
    assert_near(model_8s.forward_tokens(tokens), vectors["fixed_feat"], 1e-4)


@pytest.mark.parametrize("mode", ["mix", "tmix"], ids=["patch", "time"])
@torch.no_grad()
def test_features_of_mixed_tokens(vectors: Vectors, model_8s: AST, mode: str) -> None:
    tokens = model_8s.embed_patches(features(43, 2, 1, 798, 128))
    mask = torch.zeros(model_8s.grid, dtype=torch.bool)
    chosen = torch.from_numpy(vectors[f"fixed_{mode}_mask"])
    if mode == "mix":
        mask.view(-1)[chosen] = True
    else:
        mask[:, chosen] = True
    index = torch.from_numpy(vectors[f"fixed_{mode}_index"])
    mixed = torch.where(mask.view(-1, 1), tokens[index], tokens)
    assert 1 - mask.float().mean().item() == pytest.approx(float(vectors[f"fixed_{mode}_lam"]))
    assert_near(model_8s.forward_tokens(mixed), vectors[f"fixed_{mode}_feat"], 1e-4)


@pytest.mark.parametrize(
    ("name", "frames", "mode"),
    [
        ("pos_128_498", 498, "correct"),
        ("pos_128_798", 798, "correct"),
        ("pos_128_1024", 1024, "correct"),
        ("pos_798_128", 798, "reference"),
    ],
)
def test_positions_from_audioset(
    vectors: Vectors, audioset: dict[str, Tensor], name: str, frames: int, mode: str
) -> None:
    some = {f"module.v.{key}": audioset[f"module.v.{key}"] for key in ("cls_token", "pos_embed")}
    model = AST("tiny224", frames=frames, pos_embed_mode=mode)  # its width does not matter here
    positions = model.convert_weights(some).encoder["v.pos_embed"]
    assert_near(positions[..., :16], vectors[f"{name}_first16dims"], 1e-6)


def test_positions_and_patches_from_imagenet(vectors: Vectors) -> None:
    shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, 578, 768), "patch_embed.proj.weight": (768, 3, 16, 16)}
    tensors = {key: recipe(f"v.{key}", shape) for key, shape in shapes.items()}
    encoder = AST("tiny224").convert_weights(tensors).encoder
    assert_near(encoder["v.pos_embed"][..., :16], vectors["imagenet_pos_128_798_first16dims"], 1e-6)
    assert_near(encoder["v.patch_embed.proj.weight"][:4], vectors["imagenet_proj_first4filters"], 1e-6)
