"""The demo data in one go, as ``moepp prepare --demo``: ``python -m data_tools.demo``."""

from __future__ import annotations

import argparse

from moepp.cli.main import main as moepp_main


def main(argv: list[str] | None = None) -> int:
    """Make the demo data and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.demo", description=__doc__)
    parser.parse_args(argv)
    return moepp_main(["prepare", "--demo"])


if __name__ == "__main__":
    raise SystemExit(main())
