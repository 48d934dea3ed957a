"""Proves on one GPU what no CPU can show: ``python -m tests.gpu.prove --out proof``, from the root of the checkout.

Nothing has to be installed beyond torch, triton, numpy and transformers: parts that need DeepSpeed and others say that
they were left out. Prints one line per check as it ends, and writes proof.json and the checks' own output to the
folder. The exit code is the number of failed checks (at most 100), or 101 when the proof could not begin.

``--device cpu`` runs the same script at small sizes, to try the script; it proves nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepp.arguments import Parser
from moepp.errors import ConfigError, MoeppError
from tests.gpu.checks import CHECKS, KERNEL_CHECKS, STAGES, START_SECONDS, Check
from tests.gpu.report import FAILED, PASSED, SKIPPED, STATUSES

ROOT = Path(__file__).resolve().parents[2]
MOST_FAILURES, NOT_BEGUN = 100, 101
START_LIMIT = 180.0  # seconds to import torch and the checks: slow disks
POLL_SECONDS = 0.05
Record = dict[str, Any]


@dataclass
class Proof:
    """Runs checks in processes of their own and keeps what they found.

    Args:
        device: "cuda" or "cpu".
        out: folder for proof.json and logs.
        seconds: when they are over no further check begins.
        say: prints a line.
    """

    device: str
    out: Path
    seconds: float = 900.0
    say: Callable[[str], None] = print
    records: list[Record] = field(default_factory=list)

    def run(self, checks: Sequence[Check], stages: Sequence[Sequence[int]] = STAGES) -> int:
        """Run the checks in order and return how many failed."""
        self._end = time.monotonic() + self.seconds
        by_number = {check.number: check for check in checks}
        for stage in [*stages, *([number] for number in by_number if not any(number in one for one in stages))]:
            left = [by_number[number] for number in stage if number in by_number]
            while left:
                left = self._run_process(left)
        return sum(record["status"] == FAILED for record in self.records)

    def _run_process(self, checks: list[Check]) -> list[Check]:
        """Run them in one process as far as it goes; returns those that are left."""
        if time.monotonic() >= self._end:
            for check in checks:
                self._keep(check, _not_run(SKIPPED, f"the {self.seconds:.0f} s of the proof are over"))
            return []
        name = "-".join(str(check.number) for check in checks)
        results = self.out / f"results-{name}.jsonl"
        with (self.out / f"output-{name}.log").open("ab") as log:
            process = self._start(checks, results, log)
            try:
                return self._follow(process, checks, results)
            finally:
                _kill(process)

    def _start(self, checks: list[Check], results: Path, log: Any) -> subprocess.Popen[bytes]:
        results.touch()
        jobs = [f"{check.number}={check.function}" for check in checks]
        command = [sys.executable, "-m", "tests.gpu.worker", str(results), self.device, *jobs]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def _follow(self, process: subprocess.Popen[bytes], checks: list[Check], results: Path) -> list[Check]:
        left, lines = list(checks), _lines_of(results)
        running = finished_one = False
        deadline = time.monotonic() + START_LIMIT
        while left:
            ended = process.poll() is not None  # before looking for lines
            for line in iter(lambda: next(lines), None):
                running = "begins" in line
                deadline = time.monotonic() + (left[0].limit if running else START_LIMIT)
                if not running:
                    finished_one = True
                    self._keep(left.pop(0), line)
            if ended and finished_one and not running:
                return left  # a check raised, and said so
            if ended and left:
                self._keep(
                    left.pop(0), _not_run(FAILED, f"the process ended with {_describe_exit(process.returncode)}")
                )
                return left
            if time.monotonic() > deadline:
                limit = left[0].limit if running else START_LIMIT
                self._keep(left.pop(0), _not_run(FAILED, f"no result within {limit:.0f} s"))
                return left
            time.sleep(POLL_SECONDS)
        return left

    def _keep(self, check: Check, record: Record) -> None:
        """Print a check's line and write everything found so far: the machine may be gone a minute later."""
        budget = check.budget if self.device == "cuda" else None
        record = record | {"number": check.number, "title": check.title, "budget": budget}
        self.records.append(record)
        self.say(line_of(record))
        for name, rows in record["notes"].items():
            if _is_table(rows):
                self.say(f"{name}:\n{_table(rows)}")
        self.write()

    def write(self) -> None:
        """proof.json, whole at every moment."""
        target, temporary = self.out / "proof.json", self.out / ".proof.json.tmp"
        temporary.write_text(json.dumps(self.as_record(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)

    def as_record(self) -> Record:
        """What the file holds; ``proven`` is what :mod:`moepp.ops` may rely on after this run."""
        machine = next((record["notes"] for record in self.records if record["number"] == 0), {})
        return {
            "device": self.device,
            "code": _commit(),
            "machine": machine,
            "proven": proven(self.device, machine, self.records),
            "checks": self.records,
        }


def proven(device: str, machine: Record, records: Sequence[Record]) -> list[Record]:
    """Kernels that this run has proven on this kind of card: all their checks passed and nothing was left out."""
    passed = {record["number"] for record in records if record["status"] == PASSED}
    if device != "cuda" or not set(KERNEL_CHECKS) <= passed or machine.get("triton") is None:
        return []
    keys = ("capability", "kernels_version", "name", "torch", "triton")
    return [{"kernels": "triton"} | {key: machine.get(key) for key in keys}]


def line_of(record: Record) -> str:
    """One line: status, number, title, seconds, and what matters most."""
    failures = [one for one in record["findings"] if not one["ok"]]
    parts = [f"{one['name']}: {_short(one['found'])}, expected {one['expected']}" for one in failures[:2]]
    if len(failures) > 2:
        parts.append(f"and {len(failures) - 2} more in proof.json")
    parts += [f"left out: {reason}" for reason in record["skipped"]]
    parts += [f"{name} {_short(value)}" for name, value in record["notes"].items() if not _is_table(value)]
    if record["status"] == PASSED:
        parts.append(f"{len(record['findings'])} expectations held")
    if record["budget"] is not None and record["seconds"] > record["budget"]:
        parts.insert(0, f"took longer than its {record['budget']:g} s")
    text = "; ".join(" ".join(part.split()) for part in parts)
    return f"{record['status']:<8}{record['number']:>3}  {record['title']}  {record['seconds']:.1f} s  {text}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _table(rows: list[Record]) -> str:
    from moepp.bench.tables import format_table

    return format_table(rows)


def _not_run(status: str, why: str) -> Record:
    findings = [{"name": "the check itself", "found": why, "expected": "a result", "ok": False}]
    failed = status == FAILED
    return {
        "status": status,
        "findings": findings if failed else [],
        "notes": {},
        "skipped": [] if failed else [why],
        "seconds": 0.0,
    }


def _lines_of(path: Path) -> Iterator[Record | None]:
    """The file's lines as they come; None whenever there is no further one yet."""
    with path.open(encoding="utf-8") as stream:
        pending = ""
        while True:
            pending += stream.readline()
            if pending.endswith("\n"):
                yield json.loads(pending)
                pending = ""
            else:
                yield None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _commit() -> Any:
    from moepp.runs.environment import source_digest

    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"commit": done.stdout.strip() or None, "source": source_digest()}


def parse_numbers(text: str, known: Sequence[int]) -> list[int]:
    """ "0-3,6" -> [0, 1, 2, 3, 6]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ConfigError(f"--checks {text} is no list of numbers; write it like 0-3,6")
        numbers += range(int(first), int(last or first) + 1)
    unknown = sorted(set(numbers) - set(known))
    if unknown or not numbers:
        raise ConfigError(f"--checks {text} names no check {unknown[:3]}; the checks are {min(known)} to {max(known)}")
    return sorted(set(numbers))


def _allowed(proof: Proof, checks: Sequence[Check]) -> str:
    """The seconds that these checks were meant to take, where they have budgets: on a GPU."""
    if proof.device != "cuda":
        return ""
    numbers = {check.number for check in checks}
    stages = sum(not numbers.isdisjoint(stage) for stage in STAGES)
    return f" (meant: {sum(check.budget for check in checks) + stages * START_SECONDS:.0f} s)"


def _require_device(device: str) -> None:
    from tests.devices import GPU, why_no_gpu

    if device == "cuda" and GPU is None:
        raise ConfigError(f"--device cuda: {why_no_gpu()}; mend that, or try the script with --device cpu")


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Check]]:
    parser = Parser(
        prog="python -m tests.gpu.prove", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for proof.json and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--checks", metavar="LIST", help="for example 0-7 or 1,3 (default: all)")
    parser.add_argument("--seconds", type=float, default=900.0, metavar="N", help="begin no check after (default: 900)")
    args = parser.parse_args(argv)
    known = [check.number for check in CHECKS]
    chosen = known if args.checks is None else parse_numbers(args.checks, known)
    if args.seconds <= 0:
        raise ConfigError(f"--seconds {args.seconds:g} must be above 0; raise it")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out {args.out} exists and is not an empty folder; name another one")
    _require_device(args.device)
    return args, [check for check in CHECKS if check.number in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof; see the module's docstring."""
    try:
        args, checks = _parse(argv)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {args.out} cannot be made ({error.strerror}); name another folder") from error
    except MoeppError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_BEGUN
    start = time.monotonic()
    proof = Proof(args.device, args.out.resolve(), args.seconds, lambda line: print(line, flush=True))
    failures = proof.run(checks)
    counts = {status: sum(record["status"] == status for record in proof.records) for status in STATUSES}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{counted} in {time.monotonic() - start:.0f} s{_allowed(proof, checks)};", args.out / "proof.json")
    for entry in proof.as_record()["proven"]:
        key = (entry["kernels_version"], tuple(entry["capability"]))
        print(f"proven for runtime.kernels=auto on {entry['name']}: add {key} to PROVEN in moepp/ops/triton/proven.py")
    return min(failures, MOST_FAILURES)


if __name__ == "__main__":
    raise SystemExit(main())
