# SPDX-License-Identifier: BSD-3-Clause
"""Changes of dictionaries are seen, however they are made."""

from __future__ import annotations

import sys
from collections import OrderedDict

import pytest
import torch.nn as nn

from fusedsep import _C
from fusedsep._dictionaries import Snapshot

#: Whether Python counts them; from 3.12 on nothing is current, and everything is looked at again.
COUNTED = sys.version_info < (3, 12)

CHANGES = {
    "another value": lambda kept: kept.update(a=3),
    "an equal value": lambda kept: kept.update(a=float(1)),
    "a new key": lambda kept: kept.update(b=1),
    "setdefault": lambda kept: kept.setdefault("b"),
    "a key less": lambda kept: kept.pop("a"),
    "popitem": lambda kept: kept.popitem(),
    "none left": lambda kept: kept.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_changes(change, kind):
    dictionaries = kind(a=1), kind(a=1)
    for changed in dictionaries:
        snapshot = Snapshot(dictionaries)
        assert snapshot.is_current() is COUNTED
        CHANGES[change](changed)
        assert not snapshot.is_current()
        assert Snapshot(dictionaries).is_current() is COUNTED


def test_attributes():
    """Thousands of times from one place, where Python puts faster instructions."""
    module = nn.ReLU()
    for i in range(5000):
        snapshot = Snapshot((vars(module),))
        module.inplace = i
        assert not snapshot.is_current()


def test_children_parameters_and_hooks():
    parent = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    conv = parent[0]
    for kept, change in (
        (parent._modules, lambda: parent.__setitem__(1, nn.ReLU6())),
        (parent._modules, lambda: setattr(parent, "1", nn.Identity())),
        (conv._parameters, lambda: setattr(conv, "bias", None)),
        (conv._forward_hooks, lambda: conv.register_forward_hook(print)),
        (vars(conv), lambda: setattr(conv, "forward", print)),
        (vars(conv), lambda: delattr(conv, "forward")),
        (vars(parent), lambda: parent.eval()),
    ):
        snapshot = Snapshot((kept,))
        change()
        assert not snapshot.is_current()


def test_none_and_what_is_none():
    assert Snapshot(()).is_current() is COUNTED
    assert not _C.are_unchanged(({},), b"")
    if COUNTED:
        with pytest.raises(TypeError, match="only dictionaries have versions"):
            Snapshot(([1],))
