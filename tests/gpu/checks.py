"""The checks of the proof in their order. See docs/gpu.md for what each of them shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """``function`` is ``module:name`` of a ``check(place, report)``, which must end within ``limit`` seconds.

    ``budget`` are the seconds that it is meant to take on an H100, an estimate until one has run it: what takes longer
    on a GPU is said to.
    """

    number: int
    title: str
    function: str
    limit: float = 120.0
    budget: float = 60.0


def _check(number: int, title: str, function: str, budget: float, limit: float = 120.0) -> Check:
    return Check(number, title, f"tests.gpu.{function}", limit, budget)


CHECKS: tuple[Check, ...] = (
    _check(0, "device, versions, what is chosen for it", "machine:check_machine", 5, 60),
    _check(1, "layer against the float64 oracle", "layer:check_oracle", 40, 180),
    _check(2, "FFN experts against a plain loop", "layer:check_experts", 20),
    _check(3, "Triton's kernels against torch's operations", "kernels:check_kernels", 30, 180),
    _check(4, "waits of the host for the device", "kernels:check_waits", 15),
    _check(5, "equal steps give equal bits", "kernels:check_determinism", 25),
    _check(6, "exchange through the device's collectives on one rank", "distributed:check_exchange", 45),
    _check(7, "expert parallelism of two ranks on one device", "distributed:check_two_ranks", 60, 180),
    _check(8, "a small model trained as on the CPU; generation", "training:check_training", 60, 180),
    _check(9, "checkpoint saved in the background, loaded elsewhere", "training:check_checkpoint", 30),
    _check(10, "engines against the native one", "training:check_engines", 60, 180),
    _check(11, "speed of the layer", "speed:check_layer_speed", 90, 240),
    _check(12, "speed and memory of a whole step", "speed:check_step_speed", 90, 240),
    _check(13, "the same step in transformers", "speed:check_peer_speed", 30, 240),
    _check(14, "the project's own tests of the layer and of Triton's kernels", "own_tests:check_own_tests", 120, 400),
    _check(15, "the other ways to split a model over two ranks", "layouts:check_layouts", 120, 240),
    _check(16, "compiled attention and norms", "compiled:check_compiled", 60, 240),
    _check(17, "attention with each kind of mask", "attention:check_attention", 60, 240),
)
# One process each; a check that fails ends its process, and the rest of the stage goes on in a fresh one.
STAGES: tuple[tuple[int, ...], ...] = (
    (0, 1, 2, 3, 4, 5),
    (6,),
    (7,),
    (8, 9),
    (10,),
    (11,),
    (12, 13),
    (14,),
    (15,),
    (16,),
    (17,),
)
# Calls on a machine that is lent for minutes: (checks, most seconds, the start of processes included).
CALLS = ((range(8), 300.0), (range(8, 14), 420.0))
START_SECONDS = 15.0  # of a stage's process
# What has to pass, with nothing left out, before runtime.kernels=auto may choose Triton's kernels on such a card.
KERNEL_CHECKS = (0, 1, 2, 3, 4, 5)
