"""Pretrain a MoE++ language model: `python train.py`, `torchrun ... train.py`, `deepspeed train.py`.

Every key of configs/ can be overridden on the command line, e.g. `parallel.expert=2 train.steps=1000`;
`-m` sweeps over comma-separated values.
"""

import os
import sys
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from moepp.config import explain_hydra_error, from_hydra, refuse_unknown_options
from moepp.errors import MoeppError, PeerError
from moepp.parallel.refusal import print_once
from moepp.run import run_training

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    """One run: from Hydra's configuration to the typed one, and on. The runs of a sweep get a directory each."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN and not any(o.startswith("run.") for o in job.overrides.task):
        with open_dict(cfg):
            cfg.run.name = f"{cfg.run.name}-{job.job.num}"
    try:
        run_training(from_hydra(cfg))
    except MoeppError as error:
        leave(error)


def leave(error: Exception) -> NoReturn:
    """Print what a user can cause as one line, on the first rank only, and exit with the same code on every rank."""
    message = str(error) if isinstance(error, MoeppError) else explain_hydra_error(error)
    if isinstance(error, PeerError):  # every rank has seen another thing, and the first may be the one that failed
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        print_once(f"error: {message}")
    sys.stdout.flush()
    os._exit(getattr(error, "exit_code", MoeppError.exit_code))  # exit handlers may wait for ranks that have left


def cli() -> None:
    """Run Hydra, and catch what it refuses itself."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra's errors reach the handler below
    # The deepspeed launcher adds this option; the rank is read from the environment.
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
    try:
        refuse_unknown_options(sys.argv[1:])
        main()
    except (MoeppError, HydraException, OmegaConfBaseException) as error:
        leave(error)
    except KeyboardInterrupt:
        print("interrupted; start the same command to continue from the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    cli()
