"""What one check of the proof found: values against what was expected of them, and what could not be looked at.

A check is a function ``check(place, report)``. It passes when it expected at least one thing and everything it expected
was so. What it leaves out it says (:meth:`Report.skip`): such a check is ``partial``, or ``skipped`` where nothing is
left, and never ``passed``. One that only measures, because no value would be wrong, is ``measured``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

PASSED, PARTIAL, MEASURED, SKIPPED, FAILED = "passed", "partial", "measured", "skipped", "failed"
STATUSES = (PASSED, PARTIAL, MEASURED, SKIPPED, FAILED)


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


class Skip(Exception):
    """Raised by a check that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Place:
    """Where the proof runs. On the CPU sizes are small: there the script is tried, not the machine."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: int, small: int) -> int:
        """A size for the GPU, and one for the CPU."""
        return full if self.is_cuda else small

    def require_cuda(self, what: str) -> None:
        """Raise :class:`Skip` on the CPU."""
        if not self.is_cuda:
            raise Skip(f"needs CUDA: {what}")

    def synchronize(self) -> None:
        """Wait until the device has done its work, so that its errors show here."""
        if self.is_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Finding:
    """One expectation: what was looked at, what was found, what had to be found."""

    name: str
    found: Any
    expected: str
    ok: bool

    def __str__(self) -> str:
        return f"{self.name}: {_show(self.found)}, expected {self.expected}"


@dataclass
class Report:
    """Filled by a check."""

    findings: list[Finding] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # measured, with no mark to pass
    skipped: list[str] = field(default_factory=list)
    measured: bool = False

    def expect(self, name: str, found: Any, expected: str, ok: bool) -> None:
        """Record an expectation and whether it holds."""
        self.findings.append(Finding(name, found, expected, bool(ok)))

    def at_most(self, name: str, found: float, limit: float) -> None:
        """``found`` is a number (not NaN) and no larger than ``limit``."""
        self.expect(name, found, f"at most {limit:g}", not math.isnan(found) and found <= limit)

    def equal(self, name: str, found: Any, wanted: Any) -> None:
        """Equal values."""
        self.expect(name, found, _show(wanted), found == wanted)

    def same_bits(self, name: str, found: Tensor | None, wanted: Tensor | None) -> None:
        """Two tensors that are there, of one shape and type, and equal entry by entry."""
        if found is None or wanted is None:
            self.expect(name, "no tensor", "two tensors", False)
            return
        same = found.shape == wanted.shape and found.dtype == wanted.dtype and torch.equal(found, wanted)
        self.expect(
            name, "the same bits" if same else f"a deviation of {deviation(found, wanted):.1e}", "the same bits", same
        )

    def close(self, name: str, found: Tensor | None, wanted: Tensor | None, limit: float) -> None:
        """As :func:`deviation`, no larger than ``limit``."""
        if found is None or wanted is None:
            self.expect(name, "no tensor", "two tensors", False)
            return
        self.at_most(name, deviation(found, wanted), limit)

    def note(self, name: str, value: Any) -> None:
        """Something to be printed."""
        self.notes[name] = value

    def measure(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A table of times; each must be there and above 0."""
        self.measured = True
        self.notes[name] = rows
        times = [value for row in rows for key, value in row.items() if key == "ms" or key.endswith(" ms")]
        if not times or not all(isinstance(value, float) and 0 < value < math.inf for value in times):
            self.expect(f"times of {name}", times, "positive numbers", False)

    def skip(self, what: str) -> None:
        """A part that could not be looked at, with the reason."""
        self.skipped.append(what)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that may raise :class:`Skip` without ending the check; a wrong assertion in it is a failure."""
        try:
            yield
        except Skip as reason:
            self.skip(f"{name}: {reason}")
        except AssertionError as error:
            self.expect(name, (str(error).strip().splitlines() or ["an assertion failed"])[0], "no difference", False)

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.ok]

    @property
    def status(self) -> str:
        """One of :data:`STATUSES`; a check that expected, measured and skipped nothing has failed."""
        if self.failures or not (self.findings or self.measured or self.skipped):
            return FAILED
        if not self.findings:
            return MEASURED if self.measured else SKIPPED
        return PARTIAL if self.skipped else PASSED

    def as_record(self) -> dict[str, Any]:
        """For the JSON file."""
        if self.status == FAILED and not self.findings:
            self.expect("expectations", 0, "at least one", False)
        return {
            "status": self.status,
            "findings": [asdict(finding) | {"found": _plain(finding.found)} for finding in self.findings],
            "notes": {name: _plain(value) for name, value in self.notes.items()},
            "skipped": self.skipped,
        }


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest wanted entry; infinite where shapes differ or one is not finite."""
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    found, wanted = found.detach().double(), wanted.detach().to(found.device).double()
    largest = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return float(largest) if bool(largest.isfinite()) else math.inf


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | list | dict | type(None)) else str(value)


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
