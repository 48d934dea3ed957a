"""Unusable lines: the first one ends the work, unless the user allows some, which are counted and listed."""

from __future__ import annotations

from dataclasses import dataclass, field

from moepp.errors import DataError

LISTED = 10


class BadLineError(DataError):
    """One line (row, document) that cannot be used; what comes after it can."""


@dataclass
class BadLines:
    """Counts lines that are left out, up to a limit."""

    limit: int = 0  # --max-bad-lines
    count: int = 0
    first: list[str] = field(default_factory=list)  # the first LISTED messages

    def take(self, error: BadLineError) -> None:
        """Count a bad line.

        Raises:
            DataError: it is one more than the limit.
        """
        if self.limit == 0:
            raise DataError(f"{error}, or leave such lines out with --max-bad-lines") from error
        if self.count == self.limit:
            raise DataError(f"more than --max-bad-lines={self.limit} bad lines; the next: {error}") from error
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(str(error))
