"""What the tests of the cross-data-set datamodule share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datamodules.base import RespiratoryDataModule
from respiro.datasets import write_synthetic_icbhi

Ready = Callable[..., Any]


@pytest.fixture(scope="session")
def leaky_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic ICBHI large enough to have a patient on both sides, as the real one has two."""
    return Path(write_synthetic_icbhi(tmp_path_factory.mktemp("leaky") / "icbhi", num_patients=16))


@pytest.fixture
def icbhi(icbhi_root: Path) -> ICBHIDataModule:
    return ICBHIDataModule(icbhi_root)


@pytest.fixture
def children(sprsound_root: Path) -> SPRSoundDataModule:
    return SPRSoundDataModule(sprsound_root, partial=True)


@pytest.fixture
def ready() -> Ready:
    """A datamodule with its data prepared and its tables read."""

    def prepared(data: RespiratoryDataModule, stage: str = "fit") -> Any:
        data.prepare_data()
        data.setup(stage)
        return data

    return prepared
