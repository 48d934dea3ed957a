"""The ``moepp`` console script: one subcommand per file of this folder, imported when it is asked for.

A command file has a docstring (its first line is the help), ``EXAMPLE`` (a command line), ``add_arguments(parser)`` and
``run(args) -> int``; one that reads its command line itself has ``main(arguments) -> int`` instead. What a user can
cause is printed as one line on stderr with exit code 2.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import moepp.cli
from moepp import cpu
from moepp.arguments import Parser
from moepp.errors import ConfigError, MoeppError, is_out_of_memory
from moepp.io.untrusted import printable
from moepp.runs.environment import version_line
from moepp.versions import require_supported_versions

USAGE_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 130  # 128 + SIGINT, as shells do
PIPE_EXIT_CODE = 141  # 128 + SIGPIPE
_MESSAGE_CHARACTERS = 20_000
_NO_COMMANDS = {"__main__", "main", "model_card"}  # other files of this folder
# What other trainers and tools call a command.
_SYNONYMS = {
    **dict.fromkeys(("pretrain", "run", "fit", "finetune", "resume", "sweep"), "train"),
    **dict.fromkeys(("evaluate", "evaluation", "test", "benchmark-tasks", "lm-eval", "lm_eval"), "eval"),
    **dict.fromkeys(("sample", "chat", "infer", "inference", "complete"), "generate"),
    **dict.fromkeys(("preprocess", "tokenize", "tokenise", "data"), "prepare"),
    **dict.fromkeys(("convert", "save"), "export"),
    **dict.fromkeys(("load", "upcycle"), "import"),
    **dict.fromkeys(("summary", "plot", "compare"), "report"),
    **dict.fromkeys(("status", "monitor", "top", "tail"), "watch"),
    **dict.fromkeys(("analyse", "analysis", "routing"), "analyze"),
    **dict.fromkeys(("ckpt", "checkpoints", "prune", "verify", "diff", "list"), "checkpoint"),
    **dict.fromkeys(("benchmark", "profile"), "bench"),
}


def commands() -> dict[str, str]:
    """Return the module name of every subcommand; the underscore of ``import_`` and dashes are handled here."""
    names = {module.name for module in pkgutil.iter_modules(moepp.cli.__path__)} - _NO_COMMANDS
    return {name.rstrip("_").replace("_", "-"): f"moepp.cli.{name}" for name in sorted(names)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moepp ARGV`` and return its exit code."""
    return report_errors(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def report_errors(run: Callable[[], int]) -> int:
    """Run and return its exit code; a user's error becomes one line on stderr and its own exit code, mostly 2."""
    try:
        cpu.chosen()  # a wrong kind is an error before any work
        return run()
    except MoeppError as error:
        print(f"error: {printable(' '.join(str(error).split()), _MESSAGE_CHARACTERS)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPT_EXIT_CODE
    except BrokenPipeError:  # `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        return PIPE_EXIT_CODE
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = printable(" ".join(str(error).split()) or type(error).__name__, 200)
        print(f"error: out of memory ({reason}); give it less at a time, or use a larger machine", file=sys.stderr)
        return ConfigError.exit_code


def _dispatch(argv: list[str]) -> int:
    known = commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(known))
        return 0 if argv else USAGE_EXIT_CODE
    if argv[0] in ("-V", "--version", "version"):
        print(version_line())
        return 0
    if argv[0] not in known:
        raise ConfigError(f"unknown command {argv[0]!r}; {_hint(argv[0], known)}")
    require_supported_versions()  # before a command imports what may be too old
    module = importlib.import_module(known[argv[0]])
    if hasattr(module, "main"):
        return module.main(argv[1:])
    parser = Parser(
        prog=f"moepp {argv[0]}", description=module.__doc__, epilog=f"example: {module.EXAMPLE}", allow_abbrev=False
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    if plugins := getattr(args, "plugins", ()):
        from moepp.config import import_plugin

        for name in plugins:
            import_plugin(name, "--plugin")
    return module.run(args)


def _hint(name: str, known: dict[str, str]) -> str:
    if name.startswith("-"):
        return "the command comes first, as in `moepp report RUN`; `moepp --help` lists the commands"
    if _SYNONYMS.get(name.lower()) in known:
        return f"did you mean {_SYNONYMS[name.lower()]}?"
    if "=" in name:
        return f"to train, write `moepp train {name}`"
    near = difflib.get_close_matches(name.lower(), known, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"known commands: {', '.join(known)}"


def _overview(known: dict[str, str]) -> str:
    lines = ["usage: moepp COMMAND ...", "", "commands (moepp COMMAND --help tells more; moepp --version):"]
    width = max(map(len, known), default=0)
    return "\n".join([*lines, *(f"  {name:<{width}}  {_summary(module)}" for name, module in known.items())])


def _summary(module: str) -> str:
    """Return the first line of a command's docstring, without importing it."""
    source = Path(moepp.cli.__path__[0], f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    raise SystemExit(main())
