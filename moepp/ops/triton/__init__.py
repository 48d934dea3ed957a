"""Triton's kernels; imported only where they are chosen."""
