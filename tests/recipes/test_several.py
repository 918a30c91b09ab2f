"""What a run of several processes refuses before it loads a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.run_setup import RunSetUp
from nemo_automodel.shared.errors import NotSupportedYetError


def set_up_of(num_processes: int) -> RunSetUp:
    made = RunSetUp(ConfigNode({}))
    made.ranks = SimpleNamespace(are_several=num_processes > 1, size=num_processes)
    return made


def test_a_stream_is_refused_by_the_name_of_its_section():
    made = set_up_of(2)
    made.train_loader, made.val_loaders = iter([]), {}
    with pytest.raises(
        NotSupportedYetError, match=r"^`dataset` is a stream, and streams on 2 devices are not supported"
    ):
        made._refuse_streams()
    made = set_up_of(1)
    made.train_loader, made.val_loaders = iter([]), {"default": iter([])}
    made._refuse_streams()  # one process may have one


@pytest.mark.parametrize(
    ("name", "section"), [("default", "validation_dataset"), ("squad", "validation_dataset_squad")]
)
def test_a_validation_set_has_the_name_of_its_section(name, section):
    made = set_up_of(2)
    made.train_loader, made.val_loaders = iter([]), {name: iter([])}
    assert [key for key, _ in made._loaders()] == ["dataset", section]
