"""`python train.py`, `torchrun ... train.py`, `deepspeed train.py` and `moepp train`: one run, or with `-m` a sweep.

Every key of configs/ can be overridden on the command line, e.g. ``parallel.expert=2 train.steps=1000``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from moepp import cpu
from moepp.config import (
    composition_error,
    configs_folder,
    from_hydra,
    missing_known_key,
    refuse_incomplete_overrides,
    refuse_unknown_options,
    register_defaults,
)
from moepp.errors import ConfigError, MoeppError
from moepp.io.untrusted import printable
from moepp.training import sweep
from moepp.training.leave import leave, leave_crashed, leave_interrupted
from moepp.training.sources import Sources, check_config_dir, hydra_reads_checked

CONFIG_NAME = "config"
# Options that say what is to be done; --cfg goes with --multirun and shows the jobs of the sweep.
_EXCLUSIVE = ("cfg", "info", "shell_completion", "run", "multirun")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says; ends the process with the documented exit code unless all went well."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # The deepspeed launcher adds this option; the rank is read from the environment.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    try:
        cpu.chosen()  # a wrong kind is an error before any work
        code = _run(arguments)
    except MoeppError as error:
        leave(error)
    except KeyboardInterrupt:
        leave_interrupted()
    except Exception as error:
        if (refused := composition_error(error)) is not None:
            leave(refused)
        leave_crashed()
        raise
    if code:
        sys.stdout.flush()
        raise SystemExit(code)


def _run(arguments: list[str]) -> int:
    register_defaults()
    options = _parse(arguments)
    if options.version:
        from moepp.runs.environment import version_line

        print(version_line())
        return 0
    if not Path(options.config_path).is_dir():
        raise ConfigError(f"{options.config_path} is not a folder; train from a checkout, or correct --config-path")
    check_config_dir(options.config_dir)
    if options.help or options.hydra_help or options.cfg or options.info:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # shown to `head` or `less`, which may have seen enough
    if not (options.help or options.hydra_help or options.shell_completion):
        refuse_incomplete_overrides(options.overrides)
    if options.multirun and not (options.help or options.hydra_help):
        sources = Sources(options.config_path, options.config_dir, options.config_name)
        plan = sweep.plan(sources, options.overrides)
        if plan is not None:
            if options.cfg is not None:
                return plan.show(options.cfg, options.package, options.resolve)
            return plan.run()
    _hydra(options)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's options, with what contradicts itself or would be ignored refused.

    Raises:
        ConfigError: an option that is unknown, lacks its value, or does not go with another.
    """
    refuse_unknown_options(arguments)
    parser = get_args_parser()
    parser.error = _refuse  # pyright: ignore[reportAttributeAccessIssue]
    if "--version" in arguments:  # Hydra's parser would print Hydra's
        return argparse.Namespace(version=True)
    options = parser.parse_intermixed_args(arguments)
    options.version = False
    sweep.take_mode(options)
    given = [name for name in _EXCLUSIVE if getattr(options, name)]
    if len(given) > 1 and given != ["cfg", "multirun"]:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{names} exclude one another; leave all but one out")
    if options.resolve and options.cfg is None and not options.help:
        raise ConfigError("--resolve changes what --cfg and --help show; add --cfg job, or leave it out")
    if options.package is not None and options.cfg is None:
        raise ConfigError(f"--package {options.package} chooses a part of what --cfg shows; add --cfg job")
    if options.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun reads a pickled file, which can run code; give the command of the run again, which "
            "continues it"
        )
    options.config_path = _absolute(options.config_path)
    options.config_name = options.config_name or CONFIG_NAME
    return options


def _absolute(config_path: str | None) -> str:
    """Return a folder of configurations; a relative one starts at the project's root, beside train.py."""
    configs = configs_folder()
    return str(configs if config_path is None else configs.parent / config_path)


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; `train.py --help` and `train.py --hydra-help` list the options")


def _hydra(options: argparse.Namespace) -> None:
    """Let Hydra compose one configuration and train with it, or show what it was asked for."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra's errors reach the caller
    task = hydra_main(version_base=None, config_path=options.config_path, config_name=options.config_name)(_train)
    overrides = options.overrides
    while True:
        sys.argv = [sys.argv[0], *_given_options(options), *overrides]
        try:
            with hydra_reads_checked():
                task()
            return
        except HydraException as error:
            key = missing_known_key(error)
            added = sweep.add_key(overrides, key) if key is not None else overrides
            if added == overrides:
                raise
            overrides = added
        except SystemExit as end:  # --cfg of a --package that is not there; Hydra has said so
            raise SystemExit(ConfigError.exit_code if end.code else 0) from end
        except Exception as error:
            if isinstance(error, MoeppError) or composition_error(error) is not None or _is_of_training(error):
                raise
            reason = printable(" ".join(f"{type(error).__name__}: {error}".split()), 300)
            raise ConfigError(
                f"Hydra cannot do what its options and hydra.* keys say ({reason}); correct them: `train.py "
                "--hydra-help` lists them"
            ) from error


def _is_of_training(error: Exception) -> bool:
    """Whether Hydra had started the training when the error arose."""
    return any(frame.f_code is _train.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _given_options(options: argparse.Namespace) -> list[str]:
    """Return the options for Hydra to read again; sources of configurations are passed separately."""
    flags = ("help", "hydra_help", "resolve", "run", "multirun", "shell_completion")
    valued = ("cfg", "package", "config_dir", "info")
    return [
        *(f"--{name.replace('_', '-')}" for name in flags if getattr(options, name)),
        *(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in valued if getattr(options, name)),
    ]


def _train(cfg: DictConfig) -> None:
    """Start one run from Hydra's configuration."""
    from moepp.training.run import run_training

    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:  # started by a launcher plugin, which runs each job where it likes
        with open_dict(cfg):
            sweep.number(cfg, job.job.num)
    try:
        run_training(from_hydra(cfg))
    except MoeppError as error:
        leave(error)
