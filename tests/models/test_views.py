"""Two views of a batch through a block with batch norm: one after the other, or stacked, which is not the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.models.panns import ConvBlock


@pytest.fixture(scope="module")
def expected(golden: Path) -> Any:
    return np.load(golden / "scl" / "blocks.npz")


@pytest.fixture
def block(expected: Any) -> ConvBlock:
    block = ConvBlock(1, 4, 5, 1).train()
    names = ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked")
    block.load_state_dict({name: torch.from_numpy(expected[f"views/{name}"]) for name in names})
    return block


@pytest.fixture
def views(expected: Any) -> list[Tensor]:
    return [torch.from_numpy(expected[f"views/v{view}"]) for view in (1, 2)]


def check_statistics(block: ConvBlock, expected: Any, how: str) -> None:
    state = block.state_dict()
    for name in ("mean", "var"):
        np.testing.assert_allclose(state[f"bn1.running_{name}"], expected[f"views/{how}_running_{name}"], atol=1e-5)
    assert state["bn1.num_batches_tracked"] == expected[f"views/{how}_num_batches"]


@torch.no_grad()
def test_one_view_after_the_other(block: ConvBlock, views: list[Tensor], expected: Any) -> None:
    for number, view in enumerate(views, start=1):
        np.testing.assert_allclose(block(view), expected[f"views/separate_out{number}"], atol=1e-5)
    check_statistics(block, expected, "separate")


@torch.no_grad()
def test_both_views_stacked(block: ConvBlock, views: list[Tensor], expected: Any) -> None:
    out = block(torch.cat(views))
    np.testing.assert_allclose(out, expected["views/concat_out"], atol=1e-5)
    assert np.abs(out[:3].numpy() - expected["views/separate_out1"]).max() > 0.01
    check_statistics(block, expected, "concat")
