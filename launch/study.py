"""Run the small study of docs/study.md piece by piece: ``python launch/study.py [--out FOLDER] [PIECE ...]``.

A piece is one training run in FOLDER/PIECE. Finished pieces are skipped, unfinished ones continue from their newest
checkpoint, and pieces that another copy of this program works on are left to it: start it twice to use two cores.
Needs the corpus: ``python -m data_tools.mixed``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
VANILLA = ["model=tiny_vanilla"]
# In order of importance. What a setting leaves unsaid is configs/experiment/study.yaml: MoE++ with tau 0.75.
PIECES: dict[str, list[str]] = {
    "moepp-seed1": [],
    "vanilla-seed1": VANILLA,
    "no_gating_residual-seed1": ["model.moe.gating_residual=false"],
    "tau_0.25-seed1": ["model.moe.tau=0.25"],
    "tau_1-seed1": ["model.moe.tau=1.0"],
    "tau_0.5-seed1": ["model.moe.tau=0.5"],
    "no_constant-seed1": ["model.moe.num_constant_experts=0"],
    "constant_init_0.02-seed1": ["model.constant_init_std=0.02"],
    "no_copy-seed1": ["model.moe.num_copy_experts=0"],
    "no_zero-seed1": ["model.moe.num_zero_experts=0"],
    "only_zero-seed1": ["model.moe.num_constant_experts=0", "model.moe.num_copy_experts=0"],
    "beta_0.001-seed1": ["model.moe.balance_loss_weight=0.001"],
    "vanilla_gating_residual-seed1": [*VANILLA, "model.moe.gating_residual=true"],
    "moepp-seed2": ["run.seed=2"],
    "vanilla-seed2": [*VANILLA, "run.seed=2"],
    "moepp_lr_0.001-seed1": ["optim.lr=1e-3"],
    "vanilla_lr_0.001-seed1": [*VANILLA, "optim.lr=1e-3"],
    "moepp_lr_0.008-seed1": ["optim.lr=8e-3"],
    "vanilla_lr_0.008-seed1": [*VANILLA, "optim.lr=8e-3"],
    "vanilla_beta_0.001-seed1": [*VANILLA, "model.moe.balance_loss_weight=0.001"],
    "vanilla_init_0.1-seed1": [*VANILLA, "model.init_std=0.1"],
    "moepp_init_0.1-seed1": ["model.init_std=0.1"],
    "moepp-seed3": ["run.seed=3"],
    "vanilla-seed3": [*VANILLA, "run.seed=3"],
    "balance_micro_batch-seed1": ["model.moe.balance_loss_scope=micro_batch", "train.micro_batch_size=4"],
}


POLL_SECONDS = 1.0


def main() -> int:
    """Run the pieces of the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python launch/study.py", description=__doc__)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"default: all, {', '.join(PIECES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--until", type=int, metavar="STEP", help="leave each piece there; a later call continues it")
    args = parser.parse_args()
    for name in args.pieces:
        if name not in PIECES:
            parser.error(f"{name!r} is not one of {', '.join(PIECES)}")
    if args.until is not None and args.until < 1:
        parser.error(f"--until={args.until} is below 1; name a step to stop after")
    if not Path("data/mixed/tokenizer.json").is_file():
        parser.error("data/mixed is not here; write the corpus first: python -m data_tools.mixed")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through `finally`, which ends the training
    failed = [name for name in args.pieces or PIECES if not run_piece(name, args.out, args.until)]
    print(f"failed: {', '.join(failed)}" if failed else "done", flush=True)
    return 1 if failed else 0


def command_of(name: str, folder: Path) -> list[str]:
    """Return the command that trains a piece, or continues it, in ``folder``."""
    settings = [f"run.name={name}", f"run.dir={folder}", "run.seed=1", "logging.progress=false"]
    return [sys.executable, str(TRAIN), "experiment=study", *settings, *PIECES[name]]


def run_piece(name: str, out: Path, until: int | None) -> bool:
    """Bring a piece to its end, or a little past step ``until``; False if training failed."""
    folder, done = out / name, out / f"{name}.done"
    with open(out / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _say(name, "another process is at it")
        if done.exists() or (until is not None and _step(folder) >= until):
            return _say(name, f"at step {_step(folder)} already")
        with open(out / f"{name}.log", "a") as log:
            training = subprocess.Popen(
                command_of(name, folder), stdout=log, stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ}
            )
            try:
                stopped = False
                while training.poll() is None:
                    time.sleep(POLL_SECONDS)
                    if until is not None and not stopped and _step(folder) >= until:
                        training.terminate()  # it saves a checkpoint and leaves
                        stopped = True
            finally:
                training.terminate()
                code = training.wait()
        if stopped:
            return _say(name, f"left at step {_step(folder)}")
        if code != 0:
            return not _say(name, f"failed, see {log.name}")
        done.touch()
        return _say(name, "finished")


def _step(folder: Path) -> int:
    """Return the last step that a run has written metrics of; 0 for none."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
        return json.loads(lines[-2])["step"]  # what follows the last line end may be half a line
    except (FileNotFoundError, IndexError):
        return 0


def _say(name: str, what: str) -> bool:
    print(f"{name}: {what}", flush=True)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
