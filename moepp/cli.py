"""The ``moepp`` console script: one subcommand per file in ``moepp/commands``, imported when it is asked for.

A command file has a docstring (its first line is the help), ``add_arguments(parser)`` and ``run(args) -> int``. What a
user can cause is printed as one line on stderr with exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import moepp.commands
from moepp.errors import ConfigError, MoeppError

USAGE_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 130  # 128 + SIGINT, as shells do


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other wrong input: one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def commands() -> dict[str, str]:
    """Module name of every subcommand; a trailing underscore (``import_``) and dashes are Python's affair."""
    names = [module.name for module in pkgutil.iter_modules(moepp.commands.__path__) if module.name[0] != "_"]
    return {name.rstrip("_").replace("_", "-"): f"moepp.commands.{name}" for name in sorted(names)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moepp ARGV`` and return its exit code."""
    return report_errors(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def report_errors(run: Callable[[], int]) -> int:
    """Run and return its exit code; a user's error becomes one line on stderr and exit code 2."""
    try:
        return run()
    except MoeppError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPT_EXIT_CODE


def _dispatch(argv: list[str]) -> int:
    known = commands()
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(known))
        return 0 if argv else USAGE_EXIT_CODE
    if argv[0] not in known:
        near = difflib.get_close_matches(argv[0], known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known commands: {', '.join(known)}"
        raise ConfigError(f"unknown command {argv[0]!r}; {hint}")
    module = importlib.import_module(known[argv[0]])
    parser = _Parser(prog=f"moepp {argv[0]}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv[1:]))


def _overview(known: dict[str, str]) -> str:
    lines = ["usage: moepp COMMAND ...", "", "commands (moepp COMMAND --help tells more):"]
    width = max(map(len, known), default=0)
    return "\n".join([*lines, *(f"  {name:<{width}}  {_summary(module)}" for name, module in known.items())])


def _summary(module: str) -> str:
    """First line of a command's docstring, without importing it."""
    source = Path(moepp.commands.__path__[0], f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    raise SystemExit(main())
