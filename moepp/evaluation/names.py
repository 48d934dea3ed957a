"""Which tasks there are: the paper's set, short names, and everything that the harness knows."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from moepp.errors import ConfigError, DataError
from moepp.evaluation.data import DataSource

# Task of the harness -> number of examples in the prompt. From the paper's Table 3 (arXiv 2410.07348), and two more
# zero-shot benchmarks that comparable models report.
PAPER: dict[str, int] = {
    "sciq": 0,
    "piqa": 0,
    "winogrande": 0,
    "arc_easy": 0,
    "arc_challenge": 25,
    "hellaswag": 10,
    "logiqa": 0,
    "boolq": 32,
    "lambada_openai": 0,
    "nq_open": 32,
    "mmlu": 5,
    "openbookqa": 0,
    "social_iqa": 0,
}
TITLES = {
    "sciq": "SciQ",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-E",
    "arc_challenge": "ARC-C",
    "hellaswag": "HellaSwag",
    "logiqa": "LogiQA",
    "boolq": "BoolQ",
    "lambada_openai": "LAMBADA",
    "nq_open": "NQ-open",
    "mmlu": "MMLU",
    "openbookqa": "OBQA",
    "social_iqa": "SIQA",
}
_ALIASES = {
    "arc_c": "arc_challenge",
    "arc_e": "arc_easy",
    "lambada": "lambada_openai",
    "nq": "nq_open",
    "obqa": "openbookqa",
    "siqa": "social_iqa",
}
_BIGBENCH = re.compile(r"bigbench_\w+_(multiple_choice|generate_until)")
# Names stand at the start of a line in the harness's files; reading them so takes half a second, parsing the files 30.
_NAME = re.compile(r"""^["']?(?:task|group)["']?: *["']?([\w.\-]+)""", re.MULTILINE)
_TAGS = re.compile(r"""^["']?tag["']?:(?: *["']?([\w.\-]+)["']? *$|((?: *\n *- *["']?[\w.\-]+["']?)+))""", re.MULTILINE)


def harness_tasks_folder() -> Path:
    """Return the folder of the harness's task files.

    Raises:
        DataError: the harness is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("evaluation needs lm-eval, which is not installed; run `pip install 'moepp[eval]'`")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@lru_cache(maxsize=1)
def task_families() -> dict[str, Path]:
    """Return every task, group and tag of the harness -> the folder of the family that defines it."""
    root = harness_tasks_folder()
    families: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        names = _NAME.findall(text)
        for single, several in _TAGS.findall(text):
            names += [single] if single else re.findall(r"[\w.\-]+", several.replace("- ", " "))
        for name in names:
            families.setdefault(name, root / path.relative_to(root).parts[0])
    return families


def resolve_names(tasks: Sequence[str], source: DataSource) -> list[str]:
    """Return the harness's names of the tasks, groups and tags that were asked for, each once.

    Args:
        tasks: names of the harness, short names, ``paper``, or ``bigbench`` (those whose documents ``source`` has).

    Raises:
        ConfigError: an unknown name, with the nearest known ones, or none at all.
        DataError: ``bigbench`` and no documents of it.
    """
    names: list[str] = []
    for task in tasks:
        if task == "paper":
            names += PAPER
        elif task == "bigbench":
            names += _bigbench(source)
        else:
            names.append(_known(_ALIASES.get(task, task)))
    if not names:
        raise ConfigError("no evaluation task was named; use for example --tasks paper or --tasks sciq,piqa")
    return list(dict.fromkeys(names))


def _known(name: str) -> str:
    families = task_families()
    if name in families:
        return name
    near = difflib.get_close_matches(name, ["paper", "bigbench", *_ALIASES, *PAPER, *families], n=3, cutoff=0.6)
    near = list(dict.fromkeys(near))
    hint = f"did you mean {' or '.join(near)}?" if near else f"the paper's are {', '.join(PAPER)}"
    raise ConfigError(f"unknown evaluation task {name!r}; {hint}")


def _bigbench(source: DataSource) -> list[str]:
    names = sorted(name for name in task_families() if _BIGBENCH.fullmatch(name) and source.has(name))
    if not names:
        raise DataError(
            "no documents of a bigbench task are present; put them into FOLDER/<task>/default.jsonl, for example "
            "bigbench_causal_judgment_multiple_choice/default.jsonl, and use --data FOLDER"
        )
    return names
