"""``python -m moepp`` and ``torchrun -m moepp``: the console script without its name on PATH."""

from moepp.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
