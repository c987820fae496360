from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a folder of the material that is shared beside the project, or skip the test."""

    def find(part: str) -> Path:
        folder = Path(os.environ.get("RESPIRO_SHARED", PROJECT.parent / "shared")) / part
        if not folder.exists():
            pytest.skip(f"{folder} is absent: real recordings and large reference vectors are not part of the project")
        return folder

    return find


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the reference vectors that are part of the project."""
    return PROJECT / "tests" / "golden"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep caches built by the tests out of the user's cache folder."""
    os.environ["RESPIRO_CACHE"] = str(tmp_path_factory.mktemp("respiro_cache"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder for caches, not there yet."""
    return tmp_path / "cache"


@pytest.fixture
def left_in(cache: Path) -> Callable[[], list[str]]:
    """Tell what stores lie in the cache, whole or not."""
    return lambda: [path.name for path in cache.glob("*/*") if path.suffix != ".lock"]


@pytest.fixture(scope="session")
def icbhi_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic ICBHI."""
    from respiro.datasets import write_synthetic_icbhi

    return Path(write_synthetic_icbhi(tmp_path_factory.mktemp("synthetic") / "icbhi", num_patients=8, seed=0))


@pytest.fixture(scope="session")
def sprsound_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic SPRSound."""
    from respiro.datasets import write_synthetic_sprsound

    return Path(write_synthetic_sprsound(tmp_path_factory.mktemp("synthetic") / "sprsound", seed=0))
