"""Check 15: the other ways to split a model, on two ranks that share the GPU over gloo.

gloo does not know every collective for tensors of a GPU: each is tried first, and a layout that needs one that does not
work is left out by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moepp.engine.fsdp import why_no_fsdp
from tests import parity
from tests.dist import WorkerFailure, WorkerPool
from tests.gpu.report import Place, Report
from tests.gpu.training import ENGINES, alone
from tests.parity import History, Layout, Setting, deviation, train

WORKER_SECONDS = 100.0
HEADS, FOUR_LAYERS = (("num_heads", 8), ("num_kv_heads", 4)), (("num_layers", 4),)


def check_layouts(place: Place, report: Report) -> None:
    """Steps of a small model on two ranks against one, for each way to split it."""
    device, wanted = place.device.type, dict[Setting, History]()
    pool = WorkerPool(2, WORKER_SECONDS)
    try:
        broken = {name: why for name in PROBES if (why := why_broken(pool, name, device))}
        report.note("collectives of gloo on this device", [name for name in PROBES if name not in broken])
        for name, (setting, layout, needs) in _layouts(place).items():
            if layout.engine == "fsdp" and (why := why_no_fsdp()):
                report.skip(f"{name}: {why}")
                continue
            missing = [f"{one} ({broken[one]})" for one in needs if one in broken]
            if missing:
                report.skip(f"{name}: gloo lacks {', '.join(missing)}")
                continue
            if setting not in wanted:
                with alone(place.device):
                    wanted[setting] = train(0, setting, Layout(device=device))
            try:
                found = pool.run(train, setting, layout)
            except WorkerFailure as failure:
                lines = str(failure).strip().splitlines()
                report.expect(name, f"{lines[0]}: {lines[-1]}", "a run of both ranks", False)
                continue
            worst = max(deviation(wanted[setting], history).worst for history in found)
            report.at_most(f"{name}: deviation from one rank", worst, parity.TOLERANCE)
            report.note(name, worst)
    finally:
        pool.close()


def _layouts(place: Place) -> dict[str, tuple[Setting, Layout, tuple[str, ...]]]:
    """Each with the collectives that it needs beyond all-reduce."""
    device, steps = place.device.type, place.size(20, 3)
    heads, layers = Setting(model=HEADS, steps=steps), Setting(model=FOUR_LAYERS, steps=steps)
    found = {
        "tensor": (heads, Layout(2, 2, tensor=2, device=device), ("all_to_all", "all_gather", "reduce_scatter")),
        "context": (heads, Layout(2, 1, context=2, micro_batch=4, device=device), ("all_to_all", "all_gather")),
        "pipeline": (layers, Layout(2, micro_batch=1, pipeline=2, device=device), ("send_receive",)),
        "fsdp, ZeRO-3, pipeline": (
            layers,
            Layout(2, 1, "fsdp", 3, micro_batch=1, pipeline=2, device=device),
            ("all_gather", "reduce_scatter", "send_receive"),
        ),
    }
    for engine, zero in ENGINES:
        if engine != "deepspeed":  # it makes groups of its own
            layout = Layout(2, 2, engine, zero, device=device)
            found[f"{engine}, ZeRO-{zero}"] = (heads, layout, ("all_to_all", "all_gather", "reduce_scatter"))
    return found


def why_broken(pool: WorkerPool, name: str, device: str) -> str | None:
    """What is wrong with one of gloo's collectives on tensors of this device; None: nothing."""
    try:
        return next((why for why in pool.run(_probe, name, device) if why), None)
    except WorkerFailure as failure:  # some end the process instead of raising
        return str(failure).strip().splitlines()[-1]


def _probe(rank: int, name: str, device: str) -> str | None:
    try:
        found = PROBES[name](rank, torch.arange(4.0, device=device) + 10 * rank)
    except RuntimeError as error:
        return " ".join(str(error).split())[:100]
    wanted = {
        "all_to_all": [2 * rank, 2 * rank + 1, 10 + 2 * rank, 11 + 2 * rank],
        "all_gather": [0, 1, 2, 3, 10, 11, 12, 13],
        "reduce_scatter": [10 + 4 * rank, 12 + 4 * rank],
        "send_receive": [10 - 10 * rank, 11 - 10 * rank, 12 - 10 * rank, 13 - 10 * rank],
    }[name]
    return None if found.tolist() == wanted else f"gives {found.tolist()}, not {wanted}"


def _all_to_all(rank: int, own: Tensor) -> Tensor:
    received = torch.empty_like(own)
    dist.all_to_all_single(received, own)
    return received


def _all_gather(rank: int, own: Tensor) -> Tensor:
    received = own.new_empty(8)
    dist.all_gather_into_tensor(received, own)
    return received


def _reduce_scatter(rank: int, own: Tensor) -> Tensor:
    received = own.new_empty(2)
    dist.reduce_scatter_tensor(received, own)
    return received


def _send_receive(rank: int, own: Tensor) -> Tensor:
    received = torch.empty_like(own)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, own, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)])
    for work in works:
        work.wait()
    return received


PROBES: dict[str, Callable[[int, Tensor], Tensor]] = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "send_receive": _send_receive,
}
