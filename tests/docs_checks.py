"""Finds in Markdown what is not so: links, commands, options, configuration keys and files that do not exist."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from moepp.cli.main import commands
from moepp.config import known_keys

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {key.partition(".")[0] for key in known_keys()}
GROUPS = {folder.name: folder for folder in (ROOT / "configs").iterdir() if folder.is_dir()}
# Programs of others that the pages name; their own options are not looked up.
FOREIGN = {
    "pip",
    "pre-commit",
    "ruff",
    "pyright",
    "docker",
    "wandb",
    "source",
    "mkdocs",
    "lint-imports",
    "unshare",
    "deepspeed",
}
HYDRA_OPTIONS = {"-m", "--multirun", "--cfg", "--help", "--hydra-help", "--config-dir", "--info", "--version"}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str, language: str) -> list[str]:
    """The contents of all fenced blocks of a language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in the sh blocks and of code spans that start with `moepp` or a launcher."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    spans = CODE.findall(FENCE.sub("", text))
    lines += [span for span in spans if re.match(r"(moepp|python|torchrun|mkdocs) \S|\./launch/", span)]
    found: list[list[str]] = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            found += [words[:end]] if words[:end] else []
            words = words[end + 1 :]
    return found


def wrong_commands(text: str) -> list[str]:
    """What is wrong with the commands that a page shows."""
    return [f"{' '.join(words)}: {problem}" for words in command_lines(text) for problem in _problems(words)]


def _problems(words: list[str]) -> Iterator[str]:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "moepp":
        yield from _moepp(rest)
    elif program == "python" and rest[:1] == ["-m"]:
        yield from _module(rest[1], rest[2:])
    elif program == "python" and rest[:1] == ["train.py"]:
        yield from _training(rest[1:])
    elif program == "python" and rest and rest[0].endswith(".py"):
        if not (ROOT / rest[0]).is_file():
            yield f"{rest[0]} does not exist"
    elif program == "torchrun":
        yield from _torchrun(rest)
    elif program == "pytest":
        yield from _pytest(rest)
    elif program == "sbatch":
        yield from _script(next(word for word in rest if word.endswith(".sbatch")), rest)
    elif "launch/" in program:
        yield from _script(program.removeprefix("./"), rest)
    elif program not in FOREIGN:
        yield f"{program} is not a program that tests/docs_checks.py knows"


def _script(name: str, rest: list[str]) -> Iterator[str]:
    if not (ROOT / name).is_file():
        yield f"{name} does not exist"
    if name == "launch/test.sh":
        yield from _pytest([word for word in rest if word != "--all"])
    else:
        yield from _keys(word for word in rest if not word.startswith("-"))


def _pytest(words: list[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("tests") and not list(ROOT.glob(word.partition("::")[0])):
            yield f"{word} does not exist"


def _module(name: str, rest: list[str]) -> Iterator[str]:
    if name == "pytest":
        yield from _pytest(rest)
        return
    spec = importlib.util.find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    if spec is None or (is_package and importlib.util.find_spec(f"{name}.__main__") is None):
        yield f"there is no program {name}"
    if name.startswith("moepp.cli.main"):
        yield from _moepp(rest)


def _torchrun(words: list[str]) -> Iterator[str]:
    from torch.distributed.run import get_args_parser

    known = _options(get_args_parser())
    while words and words[0].startswith("-"):
        option = words[0].partition("=")[0]
        if option == "-m":
            yield from _module(words[1], words[2:])
            return
        if option not in known:
            yield f"torchrun has no option {option}"
        takes_value = "=" not in words[0] and option != "--standalone"
        words = words[2 if takes_value else 1 :]
    if words[:1] == ["train.py"]:
        yield from _training(words[1:])


def _moepp(words: list[str]) -> Iterator[str]:
    if words[:1] in (["--help"], ["--version"], ["COMMAND"]):
        return
    if not words or words[0] not in commands():
        yield f"there is no command moepp {' '.join(words[:1])}"
    elif words[0] == "train":
        yield from _training(words[1:])
    else:
        parser, rest = _parser(words[0]), words[1:]
        while (actions := _actions(parser)) and rest and rest[0] in actions:
            parser, rest = actions[rest[0]], rest[1:]
        known = _options(parser)
        yield from (f"there is no option {w}" for w in rest if w.startswith("--") and w.partition("=")[0] not in known)
        yield from _keys(word for word in rest if re.match(r"[a-z_]+\.[a-z_.]+=", word))


@functools.cache
def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(commands()[command]).add_arguments(parser)
    return parser


def _options(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions)


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Commands below a command, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def _training(words: list[str]) -> Iterator[str]:
    skip = False
    for word in words:
        if skip or word == "...":
            skip = False
        elif word.startswith("-"):
            skip = word in ("--cfg", "--config-dir", "--info")
            if word not in HYDRA_OPTIONS:
                yield f"train.py has no option {word}"
        else:
            yield from _keys([word])


def _keys(words: Iterator[str] | list[str]) -> Iterator[str]:
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key.isupper():
            continue
        if key in GROUPS:
            own = value in ("mine", "imported", "NAME")  # files of the reader's own
            if not own and not (GROUPS[key] / f"{value}.yaml").is_file():
                yield f"there is no configs/{key}/{value}.yaml"
        elif not is_key(key):
            yield f"there is no key {key}"


def is_key(name: str) -> bool:
    """Whether this is a configuration key, a section of keys, or an entry of a key that holds a mapping."""
    keys = known_keys()
    return name in keys or any(k.startswith(f"{name}.") or name.startswith(f"{k}.") for k in keys)


def wrong_keys(text: str) -> list[str]:
    """Code spans that look like configuration keys and are none."""
    wrong = []
    for span in CODE.findall(FENCE.sub("", text)):
        match = re.match(r"([a-z_]+)((?:\.[a-z_]+)+)(?:=|$)", span)
        if match and match[1] in SECTIONS and match[2] not in (".py",) and not is_key(match[1] + match[2]):
            wrong.append(span)
    return wrong


def missing_files(text: str) -> list[str]:
    """Code spans that name files of the project and do not exist."""
    tops = "moepp|tests|configs|launch|docs|data_tools"
    named = (span for span in CODE.findall(FENCE.sub("", text)) if re.fullmatch(rf"({tops})/[\w./*-]*", span))
    return [name for name in named if not list(ROOT.glob(name.rstrip("/")))]


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page whose file, or heading in it, does not exist."""
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name)
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """Names of a page's headings, as links to them are written."""
    titles = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w -]", "", title.lower()).strip()) for title in titles}
