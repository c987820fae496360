"""Weights that others have published: where, under which licence, and by which digest a file is known."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Weights", "WeightsFile"]

_AST = "Gong et al., AST: Audio Spectrogram Transformer, Interspeech 2021"
_PANNS = (
    "Kong et al., PANNs: large-scale pretrained audio neural networks for audio pattern recognition, TASLP 28, 2020"
)


@dataclass(frozen=True)
class WeightsFile:
    """A published file of pretrained weights.

    Args:
        url: Where it is published.
        name: Under which it is kept; ``.safetensors`` or a file of ``torch.save``.
        sha256: Its digest, or the beginning of it where no more is published.
        licence: SPDX identifier.
        paper: To be cited.
        size: In bytes, where it is published.
        md5: Its digest where that is the one published. It finds damage, but no malice.

    Raises:
        ValueError: If there is no digest at all.
    """

    url: str
    name: str
    sha256: str | None
    licence: str
    paper: str
    size: int | None = None
    md5: str | None = None

    def __post_init__(self) -> None:
        if not (self.sha256 or self.md5):
            raise ValueError(f"{self.name!r} needs a digest, sha256 or md5: a file without one cannot be checked")


def _deit(name: str) -> WeightsFile:
    return WeightsFile(
        f"https://dl.fbaipublicfiles.com/deit/deit_{name}.pth",
        f"deit_{name}.pth",
        name[-8:],  # published there alone
        "Apache-2.0",
        "Touvron et al., Training data-efficient image transformers & distillation through attention, ICML 2021",
    )


def _panns(name: str, md5: str, sha256: str | None = None, size: int | None = None) -> WeightsFile:
    url = f"https://zenodo.org/records/3987831/files/{name.replace('=', '%3D')}?download=1"
    return WeightsFile(url, name, sha256, "CC-BY-4.0", _PANNS, size, md5)


class Weights(Enum):
    """Published weights for :func:`load_weights`; each value tells address, digest, licence and paper.

    Example:
        >>> Weights.AST_AUDIOSET.value.licence
        'BSD-3-Clause'
    """

    #: AST base384 from ImageNet and AudioSet (0.4593 mAP), as safetensors, which cannot hold code.
    AST_AUDIOSET = WeightsFile(
        "https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593/resolve/"
        "f826b80d28226b62986cc218e5cec390b1096902/model.safetensors",
        "ast_audioset_10_10_0.4593.safetensors",
        "ae0c1e2ad4e1381d851fa9bf298ba13ebc9c5a914cdee2dbe427a6583869924d",
        "BSD-3-Clause",
        _AST,
        346_404_948,
    )
    #: The same weights as the file of their authors.
    AST_AUDIOSET_ORIGINAL = WeightsFile(
        "https://www.dropbox.com/s/cv4knew8mvbrnvq/audioset_0.4593.pth?dl=1",
        "audioset_10_10_0.4593.pth",
        "dfc313e5082dc37ece8bd3bd6e7ea8bfee6598179a14eedd15c1727ad0af788f",
        "BSD-3-Clause",
        _AST,
        352_587_836,
    )
    #: Distilled DeiT of ImageNet: AST tiny224.
    DEIT_TINY_224 = _deit("tiny_distilled_patch16_224-b40b3cf7")
    #: Distilled DeiT of ImageNet: AST small224.
    DEIT_SMALL_224 = _deit("small_distilled_patch16_224-649709d9")
    #: Distilled DeiT of ImageNet: AST base224.
    DEIT_BASE_224 = _deit("base_distilled_patch16_224-df68dfff")
    #: Distilled DeiT of ImageNet: AST base384.
    DEIT_BASE_384 = _deit("base_distilled_patch16_384-d0272ac0")
    #: CNN6 of AudioSet at 32 kHz (0.343 mAP). Zenodo, where PANNs are published, gives MD5 digests alone.
    PANNS_CNN6 = _panns("Cnn6_mAP=0.343.pth", "e25e26b84585b14c7754c91e48efc9be")
    #: CNN10 of AudioSet at 32 kHz (0.380 mAP), known by its MD5 too.
    PANNS_CNN10 = _panns("Cnn10_mAP=0.380.pth", "bfb1f1f9968938fa8ef4012b8471f5f6", size=25_237_595)
    #: CNN14 of AudioSet at 32 kHz (0.431 mAP). Several projects have recorded its SHA-256.
    PANNS_CNN14 = _panns(
        "Cnn14_mAP=0.431.pth",
        "541141fa2ee191a88f24a3219fff024e",
        "0dc499e40e9761ef5ea061ffc77697697f277f6a960894903df3ada000e34b31",
        327_428_481,
    )
