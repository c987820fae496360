"""The README and the examples run as they stand."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "report" / "result.json").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "examples").glob("*.py")))
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])  # not the arguments of pytest
    runpy.run_path(os.fspath(PROJECT / "examples" / name), run_name="__main__")


def test_the_quick_start_is_short() -> None:
    assert len((PROJECT / "examples" / "quickstart.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "examples").glob("*.yaml")))
def test_the_example_config_is_accepted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from respiro.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", os.fspath(PROJECT / "examples" / name), "--print_config"])
    assert stopped.value.code == 0
    assert "class_path: respiro.methods." in capsys.readouterr().out
