"""Kernels in C for the CPU, compiled for the machine that they run on. The layer is understood without them."""
