"""Run the small study of docs/study.md piece by piece: ``python launch/study.py [--out FOLDER] [PIECE ...]``.

A piece is one training run in FOLDER/PIECE. Finished pieces are skipped, unfinished ones continue from their newest
checkpoint, and pieces that another copy of this program works on are left to it: start it twice to use two cores.
Needs the corpus: ``python -m data_tools.mixed``.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
VANILLA = ["model=tiny_vanilla"]
# In order of importance. What a setting leaves unsaid is configs/experiment/study.yaml: MoE++ with tau 0.75.
PIECES: dict[str, list[str]] = {
    "moepp-seed1": [],
    "vanilla-seed1": VANILLA,
    "no_gating_residual-seed1": ["model.moe.gating_residual=false"],
    "tau_0.25-seed1": ["model.moe.tau=0.25"],
    "tau_0.5-seed1": ["model.moe.tau=0.5"],
    "tau_1-seed1": ["model.moe.tau=1.0"],
    "moepp-seed2": ["run.seed=2"],
    "vanilla-seed2": [*VANILLA, "run.seed=2"],
    "no_constant-seed1": ["model.moe.num_constant_experts=0"],
    "no_copy-seed1": ["model.moe.num_copy_experts=0"],
    "no_zero-seed1": ["model.moe.num_zero_experts=0"],
    "beta_0.001-seed1": ["model.moe.balance_loss_weight=0.001"],
    "moepp-seed3": ["run.seed=3"],
    "vanilla-seed3": [*VANILLA, "run.seed=3"],
    "balance_micro_batch-seed1": ["model.moe.balance_loss_scope=micro_batch", "train.micro_batch_size=4"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python launch/study.py", description=__doc__)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"default: all, {', '.join(PIECES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args()
    for name in args.pieces:
        if name not in PIECES:
            parser.error(f"{name!r} is not one of {', '.join(PIECES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.pieces or PIECES if not _run(name, args.out)]
    print(f"failed: {', '.join(failed)}" if failed else "done", flush=True)
    return 1 if failed else 0


def _run(name: str, out: Path) -> bool:
    """Bring one piece to its end; False if training failed."""
    with open(out / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: another process is at it", flush=True)
            return True
        if (out / f"{name}.done").exists():
            print(f"{name}: done before", flush=True)
            return True
        seed = [] if any(text.startswith("run.seed=") for text in PIECES[name]) else ["run.seed=1"]
        command = [sys.executable, str(TRAIN), "experiment=study", f"run.name={name}", f"run.dir={out / name}"]
        with open(out / f"{name}.log", "a") as log:
            code = subprocess.run(
                [*command, "logging.progress=false", *seed, *PIECES[name]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            ).returncode
        if code == 0:
            (out / f"{name}.done").touch()
        print(f"{name}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)
        return code == 0


if __name__ == "__main__":
    raise SystemExit(main())
