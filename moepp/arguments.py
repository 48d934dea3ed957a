"""The argument parser of every command: what argparse would take without a word is refused in one line.

Options may stand between positional arguments. Refused are an option given twice (argparse keeps the last), an empty
text (a path of "" means the current folder), a number that is not finite, and one that no machine word holds.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from moepp.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "xpu")  # of runtime.device and --device; "cuda" is AMD's too
KERNELS = ("auto", "torch", "cpu", "triton")  # of runtime.kernels and --kernels
_LARGEST = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other wrong input: one line.

    An argument whose ``may_be_empty`` attribute is set takes an empty text: ``may_be_empty(parser.add_argument(...))``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seen: set[str] = set()
        self._is_mixing = False
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self.register("action", "store_true", _StoreTrueOnce)
        self.register("type", float, _finite)
        self.register("type", int, _integer)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._seen.clear()
        if args is not None and self._subparsers is None:  # with them, the right parser reads the options
            self._refuse_unknown_options(args)
        if self._subparsers is not None or self._is_mixing:
            return super().parse_known_args(args, namespace)
        self._is_mixing = True  # what follows calls this method for the options, then for the rest
        try:
            return super().parse_known_intermixed_args(args, namespace)
        finally:
            self._is_mixing = False

    def _refuse_unknown_options(self, args: Sequence[str]) -> None:
        """Refuse an option that does not exist, before one that is missing because of it."""
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            name = arg.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions and " " not in name:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unrecognized arguments: {name}" + (f" (did you mean {near[0]}?)" if near else ""))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        leads_on = isinstance(action, argparse._SubParsersAction)  # its values are read again, by the right parser
        if not (arg_string.strip() or leads_on or getattr(action, "may_be_empty", False)):
            raise argparse.ArgumentError(action, "is empty; give a value")
        return super()._get_value(action, arg_string)  # pyright: ignore[reportAttributeAccessIssue]

    def see(self, action: argparse.Action, option: str | None) -> None:
        """Note that an option was given; refuse it the second time."""
        if option is None:
            return
        if action.dest in self._seen:
            raise argparse.ArgumentError(action, "is given twice; leave one out")
        self._seen.add(action.dest)


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--plugin`` on a command that reads a run: what a run names is not imported unless the user says so."""
    parser.add_argument(
        "--plugin",
        dest="plugins",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that registers parts of the model, as in runtime.plugins; may be given several times",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--device`` on a command that computes; see :func:`moepp.distributed.device.pick_device`."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU where there is one")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``model``, and ``--tokenizer`` and ``--eod-token`` where it does not bring its own."""
    parser.add_argument("model", metavar="RUN_OR_FOLDER", help="run directory, checkpoint, or folder with config.json")
    add_tokenizer_options(parser, "the model's own")


def add_tokenizer_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare ``--tokenizer`` and ``--eod-token``."""
    parser.add_argument("--tokenizer", metavar="FILE", help=f"tokenizer.json (default: {default})")
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="token that ends a document, for models that do not know it (runs and exports do)",
    )


def add_sharing_options(parser: argparse.ArgumentParser, precisions: Iterable[str]) -> None:
    """Declare in which precision, on how many processes and on which device a model is built."""
    parser.add_argument("--precision", choices=tuple(precisions), help="default: as trained; fp32 for a folder")
    parser.add_argument("--expert-parallel", type=int, default=1, metavar="P", help="processes that share the experts")
    add_device_option(parser)


def require_at_least(args: argparse.Namespace, **minima: int) -> None:
    """Raise :class:`ConfigError` for an option that is given and below its minimum."""
    for name, minimum in minima.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')}={value} is below its minimum {minimum}; raise it")


def may_be_empty(action: argparse.Action) -> None:
    """Let an argument be an empty text."""
    action.may_be_empty = True  # pyright: ignore[reportAttributeAccessIssue]


class _StoreOnce(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.see(self, option_string)
        setattr(namespace, self.dest, values)


class _StoreTrueOnce(_StoreOnce):
    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, const=True, default=False, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, True, option_string)


def _number(convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}; give one") from None

    return read


def _to_finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def _to_integer(text: str) -> int:
    if abs(value := int(text)) > _LARGEST:
        raise ValueError
    return value


_finite = _number(_to_finite, "a finite number")
_integer = _number(_to_integer, "an integer of at most 64 bits")
