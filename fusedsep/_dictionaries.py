# SPDX-License-Identifier: BSD-3-Clause
"""Whether dictionaries, such as the attributes of modules, have been changed."""

from __future__ import annotations

from typing import Any

from . import _C


class Snapshot:
    """Dictionaries as they are now. What their values hold in turn does not count."""

    def __init__(self, dictionaries: tuple[dict[str, Any], ...]) -> None:
        self._dictionaries = dictionaries
        self._versions = _C.dictionary_versions(dictionaries)

    def is_current(self) -> bool:
        """Whether none has changed since; ``False`` too where Python cannot tell, which is from 3.12 on."""
        return self._versions is not None and _C.are_unchanged(self._dictionaries, self._versions)
