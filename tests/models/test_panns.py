from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from respiro.component import Backbone, build, describe
from respiro.models import CNN6, CNN10, CNN14, LinearHead
from respiro.models.panns import ConvBlock, pool_map


def weights(arrays: Any, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(prefix)}


def test_blocks_give_the_reference_maps(golden: Path) -> None:
    expected = np.load(golden / "scl" / "blocks.npz")
    wide, double = ConvBlock(1, 4, 5, 1), ConvBlock(4, 6, 3, 2)
    wide.load_state_dict(weights(expected, "b5/"))
    double.load_state_dict(weights(expected, "b3/"))
    x = torch.from_numpy(expected["x"])
    with torch.no_grad():
        for mode in ("eval", "train"):
            wide.train(mode == "train")
            double.train(mode == "train")
            y = wide(x)
            np.testing.assert_allclose(y, expected[f"b5_out_{mode}"], atol=1e-5)
            if mode == "eval":
                np.testing.assert_allclose(double(y, pool=1), expected["b3_out_eval_pool1"], atol=1e-5)
            np.testing.assert_allclose(double(y), expected[f"b3_out_{mode}"], atol=1e-5)
    for name, block in (("b5", wide), ("b3", double)):
        state = block.state_dict()
        for key, value in weights(expected, f"after/{name}/").items():
            np.testing.assert_allclose(state[key], value, atol=1e-5, err_msg=key)


def test_pool_is_the_published_formula(golden: Path) -> None:
    expected = np.load(golden / "scl" / "blocks.npz")
    x = torch.from_numpy(expected["feat"])
    np.testing.assert_allclose(pool_map(x), expected["pool_scl_as_coded"], atol=1e-5)
    np.testing.assert_allclose(pool_map(x.transpose(2, 3)), expected["pool_panns_semantics"], atol=1e-5)


@pytest.mark.parametrize("orientation", ["freq_first", "time_first"])
def test_bn0_is_the_batch_norm_of_panns(golden: Path, orientation: Any) -> None:
    expected = np.load(golden / "scl" / "panns_frontend.npz")
    model: Any = CNN6(orientation, bn0=True).eval()
    model.bn0.load_state_dict(weights(expected, "bn0.") | {"num_batches_tracked": torch.tensor(0)})
    seen: list[Tensor] = []
    model.conv_block1.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    features = torch.from_numpy(expected["logmel"])[:, 0]
    kept = features.clone()
    with torch.no_grad():
        model(features)
    image = torch.from_numpy(expected["after_bn0"])
    torch.testing.assert_close(seen[0], image if orientation == "time_first" else image.mT, rtol=1e-5, atol=1e-5)
    assert torch.equal(features, kept)


def test_bn0_needs_the_mel_bins_of_panns() -> None:
    with pytest.raises(ValueError, match=r"must have the 64 mel bins that bn0 scales, got 32; .* or bn0=False"):
        CNN10(bn0=True)(torch.randn(2, 64, 32))


@pytest.mark.parametrize(
    ("cls", "parameters", "tensors"), [(CNN6, 4_304_320, 24), (CNN10, 4_686_144, 48), (CNN14, 75_477_312, 72)]
)
def test_parameters_bear_the_names_and_shapes_of_panns(
    golden: Path, cls: type[Backbone], parameters: int, tensors: int
) -> None:
    layout = json.loads((golden / "scl" / "state_dict_layout.json").read_text())["panns"][cls.__name__.capitalize()]
    with torch.device("meta"):
        model = cls()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state == {key: shape for key, (shape, _) in layout["keys"].items() if key.startswith("conv_block")}
    assert len(state) == tensors


@pytest.mark.parametrize("frames", [16, 61, 251])
@pytest.mark.parametrize("cls", [CNN6, CNN10])
def test_shape_over_durations(cls: type[Backbone], frames: int) -> None:
    model = cls().eval()
    with torch.no_grad():
        assert model(torch.randn(1, frames, 32)).shape == (1, model.num_features)


def test_cnn14_shape_and_size() -> None:
    model = CNN14().eval()
    with torch.no_grad():
        assert model(torch.randn(1, 32, 33)).shape == (1, model.num_features) == (1, 2048)
    with pytest.raises(ValueError, match=r"31 frames of 64 bins, but CNN14 needs at least 32 of each"):
        model(torch.randn(1, 31, 64))


def test_orientations_see_transposed_images() -> None:
    model = CNN6().eval()
    other = CNN6("time_first").eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 48, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x.transpose(1, 2)))
        assert not torch.allclose(other(x), model(x))


def test_gradients_reach_every_parameter_in_a_batch_of_one() -> None:
    model = CNN10(dropout=0.2, bn0=True)
    model(torch.randn(1, 32, 64)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_only_in_training() -> None:
    model, x = CNN6(dropout=0.5).eval(), torch.randn(2, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_state_dict_and_description_round_trip() -> None:
    model = CNN6("time_first", dropout=0.1, bn0=True).eval()
    again: Any = build(describe(model), Backbone, "backbone").eval()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    x = torch.randn(2, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    assert again.orientation == "time_first"


@pytest.mark.parametrize("shape", [(2, 15, 64), (2, 64, 15)], ids=["frames", "bins"])
def test_too_small_input_names_the_least(shape: tuple[int, ...]) -> None:
    message = f"features have {shape[1]} frames of {shape[2]} bins, but CNN6 needs at least 16 of each"
    with pytest.raises(ValueError, match=message):
        CNN6()(torch.randn(shape))


@pytest.mark.parametrize("shape", [(64, 64), (2, 1, 64, 64)], ids=["2d", "4d"])
def test_wrong_rank(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"features must have shape \(B, T, F\), got \("):
        CNN6()(torch.randn(shape))


def test_unknown_orientation() -> None:
    with pytest.raises(ValueError, match="orientation must be 'freq_first' or 'time_first', got 'frequency'"):
        CNN6("frequency")  # type: ignore[arg-type]


@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer-norm"])
def test_linear_head_is_its_equation(layer_norm: bool) -> None:
    head = LinearHead(6, num_classes=3, dropout=0.5, layer_norm=layer_norm).eval()
    z = torch.randn(5, 6)
    x = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() if layer_norm else z
    torch.testing.assert_close(head(z), x @ head.linear.weight.T + head.linear.bias)
    again = build(describe(head), LinearHead, "head")
    assert (again.in_features, again.num_classes) == (6, 3)
    assert isinstance(again.norm, nn.LayerNorm) == layer_norm
    again.load_state_dict(head.state_dict())
