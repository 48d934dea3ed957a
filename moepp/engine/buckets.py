"""How a group's flat buffer is cut into buckets: arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A bucket's place in the flat buffer: elements [start, stop), parameters [first, first + size)."""

    start: int
    stop: int
    first: int
    size: int

    @property
    def length(self) -> int:
        """Elements, padding included."""
        return self.stop - self.start


def cut(sizes: Sequence[int], bucket_elements: int, align: int = 1, multiple: int = 1) -> tuple[list[int], list[Span]]:
    """Lay parameters of ``sizes`` elements one after the other, and cut from the end, where backward begins.

    Args:
        sizes: elements of each parameter.
        bucket_elements: a bucket ends with the parameter that makes it so long.
        align: every parameter starts at a multiple of it within its bucket.
        multiple: every bucket's length is one of it, so that so many ranks can share it equally.

    Returns:
        Where each parameter starts in the flat buffer, and the buckets in its order; the last one ends the buffer.
    """
    counts, length, count = [], 0, 0
    for index in reversed(range(len(sizes))):
        length, count = length + _up(sizes[index], align), count + 1
        if length >= bucket_elements or index == 0:
            counts.append(count)
            length, count = 0, 0
    starts, spans, position, first = [], [], 0, 0
    for count in reversed(counts):
        start = position
        for size in sizes[first : first + count]:
            starts.append(position)
            position += _up(size, align)
        position = start + _up(position - start, multiple)
        spans.append(Span(start, position, first, count))
        first += count
    return starts, spans


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
