"""Any image encoder of timm, by name, on spectrograms."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from respiro.component import Backbone

__all__ = ["TimmBackbone"]

_OWN_ARGUMENTS = {"pretrained", "checkpoint_path", "num_classes", "in_chans"}


class TimmBackbone(Backbone):
    """An encoder of timm on spectrograms as images ``(B, in_channels, T, F)``, with random weights.

    Most convolutional encoders accept any size. Encoders made for one image size (most transformers) get the
    spectrogram resized to that size by bilinear interpolation. To build such an encoder for the spectrogram's own size
    instead, pass ``model_args={"img_size": [T, F]}`` or ``{"dynamic_img_size": True}``, where the encoder knows it.

    Args:
        name: Name of an encoder in ``timm.list_models()``.
        in_channels: Channels of the encoder's input; the spectrogram is repeated in each.
        model_args: Further arguments of the encoder, plain data.

    Shape:
        features ``(B, T, F)``; returns embeddings ``(B, num_features)``.

    Raises:
        ValueError: If timm has no encoder of that name, or *model_args* names what is decided here.

    Example:
        >>> import torch
        >>> backbone = TimmBackbone("resnet18").eval()
        >>> backbone(torch.zeros(2, 64, 32)).shape, backbone.num_features
        (torch.Size([2, 512]), 512)
    """

    def __init__(self, name: str, in_channels: int = 1, model_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            close = get_close_matches(name, timm.list_models(), n=5)
            hint = f"close names: {', '.join(close)}" if close else "timm.list_models() lists all"
            raise ValueError(f"name must be an encoder of timm, got {name!r}; {hint}")
        arguments = dict(model_args or {})
        if taken := sorted(_OWN_ARGUMENTS & arguments.keys()):
            raise ValueError(f"model_args cannot hold {', '.join(taken)}: in_channels and the weights are set apart")
        self.in_channels = in_channels
        encoder: Any = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_channels, **arguments)
        self.encoder = encoder
        # Some encoders widen the embedding after the last stage; older releases of timm do not say so by this name.
        self.num_features = int(getattr(encoder, "head_hidden_size", encoder.num_features))
        self.image_size = _image_size(encoder.pretrained_cfg, arguments)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings ``(B, num_features)``."""
        if features.ndim != 3:
            raise ValueError(f"features must have shape (B, T, F), got {tuple(features.shape)}")
        image = features.unsqueeze(1)
        if self.image_size is not None and tuple(image.shape[2:]) != self.image_size:
            image = F.interpolate(image, size=self.image_size, mode="bilinear", align_corners=False)
        embeddings: Tensor = self.encoder(image.expand(-1, self.in_channels, -1, -1))
        return embeddings


def _image_size(config: dict[str, Any], arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Return the only size that the encoder accepts, or None if it accepts any."""
    if arguments.get("dynamic_img_size") or not config.get("fixed_input_size"):
        return None
    size = arguments.get("img_size", config["input_size"][1:])
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
