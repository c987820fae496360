"""The forms in which weights for the CNNs of PANNs are found, and how each becomes our state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from respiro.models.weights import Converted

__all__ = ["convert"]

_FIRST = "conv_block1.conv1.weight"
#: By the size of the kernels and the number of blocks.
_NETWORKS = {(5, 4): "CNN6", (3, 4): "CNN10", (3, 6): "CNN14"}
#: Front end and classifier of AudioSet, and the projector of Moummad and Farrugia, whose layers have two names each.
_UNUSED = (
    "spectrogram_extractor.",
    "logmel_extractor.",
    "fc1.",
    "fc_audioset.",
    "projector.",
    "linear1.",
    "linear2.",
    "bn.",
)


def convert(tensors: Mapping[str, Tensor], bn0: bool) -> Converted:
    """Return the tensors of a file under the names of PANNs, whatever stands before them in the file.

    The network is looked for under any prefix (``model.``, ``module.``, ``cnn6.``, ``backbone.``); what lies beside it,
    under another, is not used.

    Args:
        tensors: All tensors of the file.
        bn0: Whether the model has the batch norm in front.
    """
    prefixes = [name.removesuffix(_FIRST) for name in tensors if f".{name}".endswith(f".{_FIRST}")]
    if len(prefixes) != 1:
        several = f"a file of {len(prefixes)} networks, under {', '.join(map(repr, prefixes))}" if prefixes else ""
        return Converted(dict(tensors), looks_like=several)
    names = {name.removeprefix(prefixes[0]): name for name in tensors if name.startswith(prefixes[0])}
    head = {name: names[name] for name in names if name.startswith("linear.")}
    unused = (*_UNUSED, "linear.") if bn0 else (*_UNUSED, "linear.", "bn0.")
    encoder = {name: tensors[file_name] for name, file_name in names.items() if not name.startswith(unused)}
    used = {names[name] for name in (*encoder, *head)}
    return Converted(encoder, head, [name for name in tensors if name not in used], _looks_like(encoder))


def _looks_like(encoder: Mapping[str, Tensor]) -> str:
    kernel = encoder[_FIRST].shape[-1:].numel()
    blocks = len({name.split(".")[0] for name in encoder if name.startswith("conv_block")})
    network = _NETWORKS.get((kernel, blocks))
    return f"a checkpoint of {network}" if network else ""
