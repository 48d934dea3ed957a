"""The proof on one GPU (``python -m tests.gpu.prove``), and tests that run where there is one. See docs/gpu.md."""
