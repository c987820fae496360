"""Components describe themselves as plain data and are built again from it."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from torch import nn

from respiro.component import Backbone, Component, Loss, Transform, build, describe, eval_mode
from respiro.errors import CheckpointError
from respiro.losses import CrossEntropy
from respiro.models import CNN6, LinearHead
from respiro.transforms import KaldiFbank


class Pair(Component):
    """Holds two parts, one of them in a list."""

    def __init__(self, first: Component, others: list[Component], name: str = "pair") -> None:
        super().__init__()
        self.first = first
        self.others = nn.ModuleList(others)


def test_defaults_are_recorded() -> None:
    assert describe(LinearHead(8, num_classes=2)) == {
        "class_path": "respiro.models.LinearHead",
        "init_args": {"in_features": 8, "num_classes": 2, "dropout": 0.0, "layer_norm": False},
    }


@pytest.mark.parametrize(
    "part", [LinearHead(8, 2), CNN6(), KaldiFbank(num_mel_bins=64), CrossEntropy(weight=[1.0, 2.0])]
)
def test_build_reverses_describe(part: Component) -> None:
    spec = json.loads(json.dumps(describe(part)))
    again = build(spec, Component, "part")
    assert type(again) is type(part)
    assert describe(again) == spec


def test_nested_components_are_described_in_place() -> None:
    spec = Pair(LinearHead(4, 2), [LinearHead(3, 2)]).spec()
    assert spec["init_args"]["first"] == describe(LinearHead(4, 2))
    assert spec["init_args"]["others"] == [describe(LinearHead(3, 2))]


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))], ids=["deepcopy", "pickle"]
)
def test_copies_remember_too(clone) -> None:  # type: ignore[no-untyped-def]
    assert describe(clone(LinearHead(8, 2))) == describe(LinearHead(8, 2))


def test_a_spec_survives_weights_only() -> None:
    buffer = io.BytesIO()
    torch.save(describe(CNN6()), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == describe(CNN6())


def test_a_module_is_used_as_it_is() -> None:
    foreign = nn.Linear(2, 2)
    assert build(foreign, Loss, "loss") is foreign
    assert describe(foreign) == {"class_path": "torch.nn.Linear"}


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ({"class_path": "mylab.losses.Foo"}, Loss, r"'mylab.losses.Foo', which respiro did not write.*loss=\.\.\."),
        ({"class_path": "os.system", "init_args": {}}, Loss, "did not write"),
        ({"class_path": "respiro_evil.Foo"}, Loss, "did not write"),
        ({"class_path": "respiro.losses.Gone"}, Loss, "does not have"),
        ({"class_path": "respiro.nowhere.Gone"}, Loss, "does not have"),
        ({"class_path": "respiro.models.CNN6"}, Transform, "not a Transform"),
        ({"class_path": "respiro.models.CNN6", "init_args": {"colour": 1}}, Backbone, "cannot be built"),
    ],
    ids=["foreign", "builtin", "look-alike", "class-gone", "module-gone", "other-kind", "other-arguments"],
)
def test_what_cannot_be_built_says_so(spec: dict[str, object], kind: type[Component], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build(spec, kind, "loss")


def test_numpy_scalars_are_plain() -> None:
    assert describe(LinearHead(8, 2, dropout=np.float64(0.5)))["init_args"]["dropout"] == 0.5  # type: ignore[arg-type]
    assert type(describe(LinearHead(8, 2, dropout=np.float64(0.5)))["init_args"]["dropout"]) is float  # type: ignore[arg-type]


def test_a_foreign_part_inside_a_part_is_asked_for_under_the_outer_name() -> None:
    spec = Pair(LinearHead(4, 2), []).spec() | {"class_path": "respiro.models.LinearHead"}
    spec["init_args"]["first"] = {"class_path": "mylab.Foo"}
    with pytest.raises(CheckpointError, match=r"'mylab.Foo', which respiro did not write.*\(path, head=\.\.\.\)"):
        build(spec, Component, "head")


def test_eval_mode_gives_every_part_its_own_mode_back() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    network[0].eval()
    with eval_mode(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == [True, False, True]


def test_what_is_no_part_says_so() -> None:
    with pytest.raises(TypeError, match="backbone must be a Backbone or another torch module, got 'CNN6'"):
        build("CNN6", Backbone, "backbone")


def test_arguments_that_are_no_plain_data_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Pair\.name holds a PurePosixPath"):
        describe(Pair(LinearHead(4, 2), [], name=PurePosixPath("x")))  # type: ignore[arg-type]
