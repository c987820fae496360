from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from respiro.component import Backbone, build, describe
from respiro.models import TimmBackbone

SMALL_VIT = {"depth": 1, "embed_dim": 48, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10t", None),
        ("mobilenetv3_small_050", None),
        ("vit_tiny_patch16_224", SMALL_VIT),
        ("vit_tiny_patch16_224", {**SMALL_VIT, "img_size": [96, 64]}),
        ("vit_tiny_patch16_224", {**SMALL_VIT, "img_size": 64}),
        ("vit_tiny_patch16_224", {**SMALL_VIT, "dynamic_img_size": True}),
    ],
    ids=["resnet", "wider-than-its-last-stage", "resized", "own-size", "square", "dynamic"],
)
def test_shapes_over_durations(name: str, arguments: dict[str, Any] | None) -> None:
    model = TimmBackbone(name, model_args=arguments).eval()
    with torch.no_grad():
        for frames in (64, 96, 256):
            assert model(torch.randn(1, frames, 64)).shape == (1, model.num_features)


def test_resizes_bilinearly_to_the_only_size() -> None:
    model = TimmBackbone("vit_tiny_patch16_224", model_args=SMALL_VIT).eval()
    x = torch.randn(2, 80, 64)
    image = F.interpolate(x[:, None], (224, 224), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.encoder(image))


def test_an_encoder_of_the_own_size_is_not_fed_a_resized_image() -> None:
    model = TimmBackbone("vit_tiny_patch16_224", model_args={**SMALL_VIT, "img_size": [80, 64]}).eval()
    x = torch.randn(2, 80, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.encoder(x[:, None]), rtol=0, atol=0)


def test_repeats_the_spectrogram_in_every_channel() -> None:
    model = TimmBackbone("resnet10t", in_channels=3).eval()
    x = torch.randn(2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.encoder(torch.stack([x, x, x], dim=1)))


def test_state_dict_and_description_round_trip() -> None:
    model = TimmBackbone("vit_tiny_patch16_224", model_args={**SMALL_VIT, "img_size": [96, 64]}).eval()
    again = build(describe(model), Backbone, "backbone").eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimmBackbone("resnet81"), "name must be an encoder of timm, got 'resnet81'; close names: .*resnet18"),
        (lambda: TimmBackbone("?"), r"got '\?'; timm.list_models\(\) lists all"),
        (lambda: TimmBackbone("hf-hub:timm/resnet18.a1_in1k"), "name must be an encoder of timm, got 'hf-hub:"),
        (lambda: TimmBackbone("resnet10t", model_args={"pretrained": True}), "model_args cannot hold pretrained"),
        (lambda: TimmBackbone("resnet10t")(torch.randn(2, 1, 64, 64)), r"features must have shape \(B, T, F\)"),
    ],
    ids=["close", "far", "hub", "own-argument", "rank"],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
