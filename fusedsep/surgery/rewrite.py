# SPDX-License-Identifier: BSD-3-Clause
"""What a fused module runs: a regenerated forward next to the untouched original.

Nothing of the model is replaced: a :class:`FusedForward` is an instance attribute ``forward`` of the module whose
forward holds the sites. Whenever a call is not what was traced, the forward of the class runs instead.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch.nn as nn

from .program import Program, RegeneratedForward
from .tracing import original_forward


class FusedForward(RegeneratedForward):
    """What ``owner(...)`` runs.

    Args:
        owner: the module; its class keeps the original forward.
        programs: a regenerated forward for training mode (``True``), for eval mode (``False``), or for both.
    """

    def __init__(self, owner: nn.Module, programs: dict[bool, Program]) -> None:
        self.owner = owner
        self.programs = programs

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return original_forward(self.owner)

    @property
    def __code__(self) -> types.CodeType:
        """``torch.export`` names its program after it."""
        return original_forward(self.owner).__code__

    @property
    def __globals__(self) -> NoReturn:
        """Only ``torch.jit.script`` asks for it."""
        raise AttributeError(
            "torch.jit.script cannot read the forwards of a fused model: "
            "script what fusedsep.defuse returns, or use torch.jit.trace or torch.export"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = self.programs.get(self.owner.training)
        if program is not None:
            arguments = program.arguments_of(args, kwargs)
            if arguments is not None and program.holds():
                return program(*arguments)
        return self.run_original(*args, **kwargs)

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the owner's class."""
        return type(self.owner).forward(self.owner, *args, **kwargs)


class FrozenForward(FusedForward):
    """A :class:`FusedForward` with sites that are folded, and so without an original to go back to."""

    def run_original(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"this call of the frozen {type(self.owner).__name__} is not the one that was frozen: other arguments than "
            "tensors and defaults, a hook on a merged module, a replaced module, a changed setting or training mode; "
            "use the model that freeze was called on for that"
        )
