# SPDX-License-Identifier: BSD-3-Clause
"""The maps of a chain while it is found, and which channels of them a node of the graph gives."""

from __future__ import annotations

from collections.abc import Iterable

from .._chain import INPUT, Part

#: What a node gives: channels of maps, side by side.
Value = tuple[Part, ...]


class Maps:
    """The input and what steps write: map i is that of step i - 1, until it becomes a part of a larger one."""

    def __init__(self) -> None:
        self._channels: dict[int, int] = {}
        self._placed: dict[int, tuple[int, int]] = {}  # the larger map, and where a map begins in it

    def copy(self) -> Maps:
        """As they are now."""
        twin = Maps()
        twin._channels, twin._placed = dict(self._channels), dict(self._placed)
        return twin

    def add(self, number: int, channels: int) -> Part:
        """A new map."""
        self._channels[number] = channels
        return Part(number, 0, channels)

    def found(self, part: Part) -> Part:
        """Where ``part`` lies now."""
        while part.map in self._placed:
            larger, begin = self._placed[part.map]
            part = Part(larger, begin + part.begin, part.channels)
        return part

    def joined(self, values: Iterable[Value]) -> Value:
        """All of them, one after the other; neighbours in one map become one part."""
        parts: list[Part] = []
        for part in (self.found(part) for value in values for part in value):
            last = parts[-1] if parts else None
            if last is not None and (last.map, last.begin + last.channels) == (part.map, part.begin):
                parts[-1] = last._replace(channels=last.channels + part.channels)
            else:
                parts.append(part)
        return tuple(parts)

    def is_whole(self, part: Part) -> bool:
        """Whether it is all of a map that steps have written, and may become a part of a larger one."""
        return part == self.found(part) and part.map != INPUT and part == Part(part.map, 0, self._channels[part.map])

    def place(self, parts: Value) -> Part:
        """Put whole maps side by side into one."""
        larger = min(self._channels) - 1  # below 0, which is the input: no number of a step
        channels = 0
        for part in parts:
            self._placed[part.map] = larger, channels
            channels += part.channels
        return self.add(larger, channels)


def channels_of(value: Value) -> int:
    """How many there are."""
    return sum(part.channels for part in value)


def cut(value: Value, begin: int, end: int) -> Value:
    """Channels [begin, end) of ``value``."""
    parts = []
    for part in value:
        first, last = max(begin, 0), min(end, part.channels)
        if first < last:
            parts.append(Part(part.map, part.begin + first, last - first))
        begin, end = begin - part.channels, end - part.channels
    return tuple(parts)
