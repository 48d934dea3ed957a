"""Pretrain a MoE++ language model: `python train.py`, `torchrun ... train.py`, `deepspeed train.py`, `moepp train`.

Every key of configs/ can be overridden on the command line, e.g. `parallel.expert=2 train.steps=1000`;
`-m` sweeps over comma-separated values.
"""

import sys

from moepp.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
