"""A sweep: its jobs are composed, checked and given a directory each before the first of them starts.

Hydra's own sweeper runs all jobs in one process, where the second finds what the first has left behind (process groups,
DeepSpeed's state, a memory that has grown), composes a job only when its turn comes, and ends with the first that
fails. Here each job has a process of its own (:mod:`moepp.training.jobs`), and gets the configuration that was checked.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf, flag_override, open_dict
from omegaconf.errors import OmegaConfBaseException

from moepp.config import Config, composition_error, from_hydra, missing_known_key, to_dict, validate
from moepp.config.compare import changed_values, differing_keys
from moepp.errors import ConfigError, MoeppError, RunError
from moepp.runs.directory import check_run_dir
from moepp.training.inputs import InputChecks
from moepp.training.jobs import Job, run_jobs
from moepp.training.sources import Sources

_BASIC = ("hydra._internal.core_plugins.basic_launcher.", "hydra._internal.core_plugins.basic_sweeper.")
# What a run is identified by besides its model, data and seed when a sweep is started again: a run of another sweep
# under the same name must not pass for a job of this one.
_IDENTITY = ("optim", "guard", "init", "train.precision")


def take_mode(options: argparse.Namespace) -> None:
    """Treat the override ``hydra.mode=MULTIRUN`` like -m, which it is another spelling of."""
    modes = [override for override in options.overrides if override.lstrip("+").startswith("hydra.mode=")]
    if any(mode.endswith("=MULTIRUN") for mode in modes):
        options.multirun = True
        options.overrides = [override for override in options.overrides if override not in modes]


def add_key(overrides: Sequence[str], key: str) -> list[str]:
    """Return the overrides with ``key=value`` turned into ``++key=value``, which sets a key that no file names."""
    return [f"++{override}" if override.startswith(f"{key}=") else override for override in overrides]


def number(cfg: DictConfig, num: int) -> None:
    """Append a job's number to the name of its run, and to its directory where that does not follow the name."""
    before = run_path(cfg)
    cfg.run.name = f"{cfg.run.name}-{num}"
    if run_path(cfg) == before:
        cfg.run.dir = f"{str(cfg.run.dir).rstrip('/')}-{num}"


def run_path(cfg: DictConfig) -> str:
    """Return the directory of a run, links and relative parts resolved."""
    folder = cfg.run.get("dir")
    return os.path.realpath(os.path.expanduser(str(folder) if folder is not None else f"runs/{cfg.run.name}"))


def plan(sources: Sources, overrides: Sequence[str]) -> Plan | None:
    """Compose and check every job of a sweep; nothing is written.

    Returns:
        The sweep, in which the jobs that cannot run carry their error; ``None`` where the configuration asks for a
        launcher or sweeper plugin, which has its own way of running jobs.

    Raises:
        ConfigError: the sweep as a whole cannot run.
        HydraException: nothing can be composed.
    """
    _refuse_several_processes()
    loader = sources.loader()
    base = _compose(loader, sources.config_name, overrides, RunMode.MULTIRUN)
    plugins = (base.hydra.launcher.get("_target_", ""), base.hydra.sweeper.get("_target_", ""))
    if not all(plugin.startswith(_BASIC) for plugin in plugins):
        return None
    for override in overrides:
        if override.lstrip("+").startswith("hydra.sweep."):
            raise ConfigError(f"{override} has no effect on where jobs are written; set run.dir or run.name")
    params = base.hydra.sweeper.params or {}
    arguments = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    combinations = BasicSweeper.split_arguments(parsed, None)[0]
    if not combinations:
        raise ConfigError(f"{' '.join(overrides)} sweeps over no value; give at least one")
    drafts = [_Draft(num, list(values)) for num, values in enumerate(combinations)]
    for draft in drafts:
        draft.compose(loader, sources.config_name)
    _give_each_a_directory(drafts)
    return Plan(drafts)


def _refuse_several_processes() -> None:
    from moepp.distributed.launch import read_launch_environment

    world_size = read_launch_environment().world_size
    if world_size > 1:
        raise ConfigError(
            f"-m runs its jobs one after another in one process each, and a launcher has started {world_size} "
            "processes; start one training per value, in a shell loop or with launch/slurm/sweep.sbatch"
        )


def configuration(sources: Sources, overrides: Sequence[str]) -> DictConfig:
    """Return what one run would get of these overrides, without Hydra's part.

    Raises:
        ConfigError: nothing can be composed.
    """
    try:
        cfg = _compose(sources.loader(), sources.config_name, overrides, RunMode.RUN)
    except Exception as error:
        if (refused := composition_error(error)) is None:
            raise
        raise refused from error
    HydraConfig.instance().set_config(cfg)  # what ${hydra:...} refers to
    return _without_hydra(cfg)


def _without_hydra(cfg: DictConfig) -> DictConfig:
    cfg = copy.deepcopy(cfg)
    with flag_override(cfg, ["struct", "readonly"], [False, False]):
        del cfg["hydra"]
    return cfg


def _compose(loader: ConfigLoaderImpl, name: str, overrides: Sequence[str], mode: RunMode) -> DictConfig:
    overrides = list(overrides)
    while True:
        try:
            return loader.load_configuration(name, overrides, mode)
        except HydraException as error:
            key = missing_known_key(error)
            added = add_key(overrides, key) if key is not None else overrides
            if added == overrides:
                raise
            overrides = added


class _Draft:
    """A job on its way from overrides to a configuration that can run."""

    def __init__(self, num: int, overrides: list[str]) -> None:
        self.num = num
        self.overrides = overrides
        self.cfg: DictConfig | None = None  # with Hydra's own part
        self.path: str | None = None
        self.error: MoeppError | None = None

    def compose(self, loader: ConfigLoaderImpl, config_name: str) -> None:
        try:
            cfg = _compose(loader, config_name, self.overrides, RunMode.RUN)
            with open_dict(cfg):
                cfg.hydra.job.num = self.num
                cfg.hydra.job.id = str(self.num)
                cfg.hydra.mode = RunMode.MULTIRUN
            self.cfg = cfg
            self._find_path()
        except Exception as error:
            self.error = composition_error(error)
            if self.error is None:
                raise

    def _find_path(self) -> None:
        assert self.cfg is not None
        self.activate()
        with contextlib.suppress(OmegaConfBaseException):  # a reference to nothing; named when all keys are resolved
            self.path = run_path(self.cfg)

    def activate(self) -> None:
        """Let ``${hydra:...}`` refer to this job."""
        assert self.cfg is not None
        HydraConfig.instance().set_config(self.cfg)

    @property
    def is_named_by_values(self) -> bool:
        assert self.cfg is not None
        return any(key in self.cfg.run and OmegaConf.is_interpolation(self.cfg.run, key) for key in ("name", "dir"))

    def number(self) -> None:
        assert self.cfg is not None
        self.activate()
        with open_dict(self.cfg):
            number(self.cfg, self.num)
        self._find_path()

    def task(self) -> DictConfig:
        """Return the configuration without Hydra's part."""
        self.activate()
        assert self.cfg is not None
        return _without_hydra(self.cfg)

    def show(self, what: str, package: str | None, resolve: bool) -> str:
        """Return the configuration, or the part ``package`` of it, as YAML."""
        task = self.task()
        assert self.cfg is not None
        shown = {"job": task, "hydra": self.cfg.hydra, "all": self.cfg}[what]
        node = shown if package in (None, "_global_") else OmegaConf.select(shown, package)
        if node is None:
            raise ConfigError(f"--package {package} is not in the configuration; name one of its sections")
        if not isinstance(node, Container):
            return f"{node}\n"
        if resolve:
            OmegaConf.set_readonly(node, False)
            OmegaConf.resolve(node)
        return OmegaConf.to_yaml(node)


def _give_each_a_directory(drafts: list[_Draft]) -> None:
    """Give the runs numbers unless the sweep itself gives each a directory of its own.

    Jobs that cannot run count too, so that mending their values does not rename the others.
    """
    placed = [draft for draft in drafts if draft.path is not None]
    if len(placed) == 1 and placed[0].is_named_by_values:
        return
    if len(placed) > 1 and not any(_overlapping(placed)):
        return
    for draft in placed:
        draft.number()
    for draft, other in _overlapping(placed):
        draft.error = draft.error or ConfigError(
            f"run.dir={draft.path} lies in the directory of job {other.num}, {other.path}; set another run.dir"
        )


def _overlapping(drafts: Sequence[_Draft]) -> Iterator[tuple[_Draft, _Draft]]:
    """Yield pairs of jobs one of which would write into the other's directory."""
    by_path: dict[str, _Draft] = {}
    for draft in drafts:
        assert draft.path is not None
        if draft.path in by_path:
            yield draft, by_path[draft.path]
        by_path[draft.path] = draft
    for draft in drafts:
        assert draft.path is not None
        for parent in Path(draft.path).parents:
            if str(parent) in by_path:
                yield draft, by_path[str(parent)]


class Plan:
    """The jobs of a sweep, composed; those that cannot run carry their error."""

    def __init__(self, drafts: list[_Draft]) -> None:
        self._drafts = drafts
        self._values = _swept_values([draft.overrides for draft in drafts])
        self._cfgs: dict[int, Config] = {}
        self._trees: dict[int, dict[str, Any]] = {}
        for draft in self._sound():
            try:
                cfg = from_hydra(draft.task())
                validate(cfg, 1)
                self._cfgs[draft.num], self._trees[draft.num] = cfg, to_dict(cfg)
            except MoeppError as error:
                draft.error = error

    def jobs(self) -> list[Job]:
        """Return the jobs, ready to run, after checking their directories and the files that they will read."""
        swept = differing_keys(list(self._trees.values())) - {"run.name", "run.dir"}
        inputs = InputChecks()
        for draft in self._sound():
            try:
                is_new = _check_directory(draft, self._trees[draft.num], swept)
                inputs.check(self._cfgs[draft.num], is_new)
            except MoeppError as error:
                draft.error = error
        return [
            Job(draft.num, self._values[draft.num], draft.path, self._trees.get(draft.num), draft.error)
            for draft in self._drafts
        ]

    def run(self) -> int:
        """Run the jobs that can, one after another; the exit code of the first that failed, or 0."""
        return run_jobs(self.jobs())

    def _sound(self) -> list[_Draft]:
        return [draft for draft in self._drafts if draft.error is None]

    def show(self, what: str, package: str | None, resolve: bool) -> int:
        """Print the configuration of every job as one YAML document each; 2 if there is one that cannot run."""
        for draft in self._drafts:
            print(f"---\n# job {draft.num}{_in_brackets(self._values[draft.num])}")
            if draft.error is not None:
                print(f"error: job {draft.num}{_in_brackets(self._values[draft.num])}: {draft.error}", file=sys.stderr)
            if draft.cfg is not None:
                print(draft.show(what, package, resolve), end="")
        return ConfigError.exit_code if any(draft.error for draft in self._drafts) else 0


def _check_directory(draft: _Draft, tree: dict[str, Any], swept: set[str]) -> bool:
    """Refuse a directory that the job could not use, or that holds a run of other values than its own.

    Returns:
        Whether it holds no run that the job would continue.

    Raises:
        RunError: the directory and what is wrong with it.
    """
    assert draft.path is not None
    held = check_run_dir(draft.path, tree, tree["run"]["resume"])
    differences = [] if held is None else changed_values(held, tree, [*swept, *_IDENTITY])
    if differences:
        raise RunError(
            f"run.dir={draft.path} already holds a run with other values ({', '.join(differences)}); give the sweep "
            "another run.name, or the values of the run"
        )
    return held is None


def _swept_values(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return the overrides that distinguish the jobs."""
    common = set(jobs[0]).intersection(*jobs[1:])
    told = [" ".join(override.lstrip("+") for override in job if override not in common) for job in jobs]
    return [text.replace("$\\{", "${").replace("\\}", "}") for text in told]  # as written, before Hydra's quoting


def _in_brackets(values: str) -> str:
    return f" ({values})" if values else ""
