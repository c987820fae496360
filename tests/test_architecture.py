"""The house rules that a machine can check: who imports whom, what is public, what an import costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import respiro

PACKAGE = Path(respiro.__file__).parent
PROJECT = PACKAGE.parent

LEARNING = {"transforms", "models", "losses", "metrics"}
#: For each room, the rooms it may import besides itself.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "component": {"errors"},
    "audio": {"errors"},
    "download": {"errors"},
    "store": {"errors", "audio", "download"},
    "datasets": {"errors", "audio", "store", "download"},
    "splits": {"errors", "audio", "datasets"},
    "datamodules": {"errors", "audio", "datasets", "splits"},
    **{room: {"errors", "component"} for room in LEARNING},
    "models": {"errors", "component", "download"},
    "methods": {"errors", "component", "audio", *LEARNING},
    "evaluation": {"errors", "component", "metrics"},
    "cli": {"_cli_fit", "errors", "datasets", "splits", "datamodules", "methods", "evaluation", *LEARNING},
    "_cli_fit": {"datamodules", "methods", *LEARNING},
    "__main__": {"cli"},
}
INTERNAL = {"audio", "store"}
SUBPACKAGES = sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")} - INTERNAL)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def respiro_imports(path: Path) -> set[str]:
    """Rooms that a file imports, imports inside functions included, imports for type checking not."""
    rooms = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "respiro":
            names = [f"respiro.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "respiro" and len(parts) > 1 and parts[1] != "__version__" and id(node) not in typing_only:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_in_one_direction(path: Path) -> None:
    room = room_of(path)
    assert respiro_imports(path) - {room} <= ALLOWED[room], f"{path} imports a room it must not"


def test_only_audio_imports_torchaudio() -> None:
    importers = [
        path for path in PACKAGE.rglob("*.py") if re.search(r"^\s*(import|from) torchaudio", path.read_text(), re.M)
    ]
    assert [path.name for path in importers] == ["waveforms.py"]


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_all_is_what_the_api_page_lists(name: str) -> None:
    page = (PROJECT / "docs" / "api.md").read_text()
    section = page.split(f"## respiro.{name}\n")[1].split("\n## ")[0]
    listed = set(re.findall(rf"respiro\.{name}\.(\w+)", section))
    public = importlib.import_module(f"respiro.{name}")
    assert listed == set(public.__all__)
    assert all(getattr(public, item).__doc__ for item in public.__all__)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("respiro", ["torch", "numpy", "pandas", "lightning"]),
        ("respiro.cli", ["torch", "pandas", "lightning"]),
        ("respiro.metrics", ["matplotlib", "librosa", "torchaudio", "timm", "lightning"]),
        ("respiro.losses", ["matplotlib", "librosa", "torchaudio", "timm", "lightning", "pandas"]),
        ("respiro.transforms", ["matplotlib", "librosa", "torchaudio", "timm", "lightning", "pandas"]),
        ("respiro.models", ["matplotlib", "librosa", "torchaudio", "timm", "lightning", "pandas"]),
        ("respiro.datasets", ["matplotlib", "librosa", "torchaudio", "timm", "lightning"]),
        ("respiro.evaluation", ["matplotlib", "librosa", "torchaudio", "timm"]),
    ],
)
def test_an_import_loads_only_what_it_needs(module: str, absent: list[str]) -> None:
    """For the rooms on torchmetrics: nothing beyond it, which loads matplotlib and librosa where they are installed."""
    first = "torchmetrics" if module in ("respiro.metrics", "respiro.evaluation") else "sys"
    code = (
        f"import sys, {first}; before = set(sys.modules); import {module}; "
        f"print(*[name for name in {absent!r} if name in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_files_stay_rooms_one_can_take_in() -> None:
    long = {path.name: lines for path in PACKAGE.rglob("*.py") if (lines := len(path.read_text().splitlines())) > 350}
    assert not long
