"""The C compiler: which one, its version, and runs of it that end with this process and say what went wrong."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_VERSION_SECONDS, _BUILD_SECONDS = 60, 600

# Runs a command and kills it with all that it started as soon as standard input ends, that is as soon as the process
# that holds the other end has ended, however it did.
_GUARD = """
exec 3<&0 </dev/null
(read -r line <&3; kill -s KILL 0) >/dev/null 2>&1 &
guard=$!
"$@" 3<&-
status=$?
kill "$guard" 2>/dev/null
wait "$guard" 2>/dev/null
exit "$status"
"""


class BuildError(Exception):
    """Why there are no compiled kernels, in one line.

    Attributes:
        is_final: whether other options of the compiler cannot help.
    """

    def __init__(self, message: str, is_final: bool = True) -> None:
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True)
class Compiler:
    """A command and what it says of its version."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """Return the compiler that ``CC`` names, or the system's.

    Raises:
        BuildError: there is none, or it does not run.
    """
    named = os.environ.get("CC", "").strip()
    found = named or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        raise BuildError("no C compiler found; install gcc or clang")
    command = shlex.split(found) if named else [found]
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer within {_VERSION_SECONDS} s"
        raise BuildError(f"the C compiler {found} does not run: {reason}; install gcc or clang, or set CC") from error
    if done.returncode != 0:
        raise BuildError(f"the C compiler {found} does not run: {_problem(done.stderr, done.returncode)}; set CC")
    return Compiler(tuple(command), done.stdout.strip())


def run_compiler(compiler: Compiler, options: list[str], scratch: Path) -> None:
    """Run it, with its temporary files in ``scratch``. It does not outlive this process.

    Raises:
        BuildError: it failed; ``is_final`` unless the options may be at fault.
    """
    # Messages in English: they are searched.
    environment = os.environ | {"TMPDIR": str(scratch), "LC_ALL": "C"}
    readable, writable = os.pipe()
    try:
        process = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", *compiler.command, *options],
            stdin=readable,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # a process group of its own, to be killed as one
        )
        try:
            _, messages = process.communicate(timeout=_BUILD_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler.command[0]} did not end within {_BUILD_SECONDS} s") from error
    except OSError as error:
        raise BuildError(f"{compiler.command[0]} cannot be started: {error.strerror}") from error
    finally:
        os.close(readable)
        os.close(writable)
    if process.returncode != 0:
        full = any(os.strerror(number) in messages for number in (errno.ENOSPC, errno.EDQUOT))
        remedy = f"; free space in {scratch.parent}, or set XDG_CACHE_HOME to another folder" if full else ""
        problem = _problem(messages.replace(f"{scratch}/", ""), process.returncode)
        raise BuildError(f"{compiler.command[0]}: {problem}{remedy}", is_final=full or "Killed" in messages)


def _problem(messages: str, code: int) -> str:
    """Return the first error line of a compiler's messages."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    marks = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "error:", "undefined reference", "cannot ")
    for mark in marks:
        for line in lines:
            if mark.lower() in line.lower():
                return line
    others = [line for line in lines if not line.startswith(("In file included from", "from "))]
    return others[0] if others else f"exit code {code}"
