"""Errors that say what went wrong, where, and how to go on.

Every error respiro raises about data, files or checkpoints derives from :class:`RespiroError`, and from the builtin
that a caller would expect (``FileNotFoundError``, ``ValueError``, ``OSError``). Wrong argument values are plain
``ValueError``.
"""

from collections.abc import Iterable


class RespiroError(Exception):
    """Base of every error that respiro defines."""


class DatasetNotFoundError(RespiroError, FileNotFoundError):
    """A data set, or a file it cannot do without, is not where it was looked for."""


class PartialDatasetError(RespiroError, ValueError):
    """Fewer recordings than the data set lists; ``partial=True`` accepts that."""


class VerificationError(RespiroError, ValueError):
    """A count or a digest differs from the published one."""


class AnnotationError(RespiroError, ValueError):
    """An annotation file, or a recording without one, cannot be used."""


class MetadataError(RespiroError, ValueError):
    """A side file (split, demographics, diagnosis, folds) has a line that makes no sense."""


class AudioError(RespiroError, ValueError):
    """A sound file cannot be used: unreadable, truncated, empty, not finite, or not in the published form."""


class StoreError(RespiroError, OSError):
    """A cache cannot be written or read: no permission, no space, or damaged."""


class DownloadError(RespiroError, OSError):
    """A download failed, or what arrived is not what was published."""


class LabelError(RespiroError, ValueError):
    """A label or class list is unknown, or does not fit the model."""


class CheckpointError(RespiroError, ValueError):
    """A checkpoint was not written by respiro, or names a part that only its author can build."""


class DivergenceError(RespiroError, ArithmeticError):
    """The training loss is not a finite number."""


class WeightsError(RespiroError, ValueError):
    """Pretrained weights do not fit the model; nothing was loaded."""


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a ``ValueError`` that lists the *allowed* values unless *value* is one of them.

    Example:
        >>> check_choice("split", "valid", ["train", "test"])
        Traceback (most recent call last):
            ...
        ValueError: split must be one of 'train', 'test', got 'valid'
    """
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
