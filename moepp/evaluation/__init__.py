"""Benchmarks through lm-evaluation-harness, with the sharded model as its backend.

The harness (lm-eval, the extra ``eval``) is imported by :mod:`.tasks`, :mod:`.backend` and :mod:`.evaluate` only;
whoever may run without it imports those inside functions.
"""
