"""Benchmarks that users run on their own machines: one file per benchmark, run by ``moepp bench``."""
