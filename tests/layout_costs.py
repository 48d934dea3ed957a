"""Step time and bytes sent by layout on this machine: ``python -m tests.layout_costs`` prints the table.

Four processes in every layout, which share this machine's cores: the times show what a layout adds in work and waiting,
not how it would do on GPUs. The bytes are counted and depend on nothing but the layout and the model.
"""

from __future__ import annotations

import statistics

from tests.dist import WorkerPool
from tests.parity import Layout, Setting, train

RANKS, STEPS, SKIPPED = 4, 7, 2  # the first steps allocate and compile
SETTING = Setting(
    "adamw",
    model=(("num_layers", 4), ("hidden_size", 256), ("num_heads", 8), ("num_kv_heads", 4), ("vocab_size", 1024)),
    moe=(("ffn_hidden_size", 512), ("balance_loss_scope", "data_parallel")),
    steps=STEPS,
    seq_len=256,
)
LAYOUTS = {
    "data 4": Layout(RANKS, micro_batch=1),
    "data 4, ZeRO-1": Layout(RANKS, zero=1, micro_batch=1),
    "data 4, expert 4": Layout(RANKS, 4, micro_batch=1),
    "pipeline 4": Layout(RANKS, micro_batch=1, pipeline=4),
    "pipeline 2, data 2": Layout(RANKS, micro_batch=1, pipeline=2),
    "pipeline 2 interleaved, data 2": Layout(RANKS, micro_batch=1, pipeline=2, chunks=2),
    "pipeline 2, expert 2": Layout(RANKS, 2, micro_batch=1, pipeline=2),
    "tensor 4": Layout(RANKS, micro_batch=1, tensor=4),
    "context 4, ulysses": Layout(RANKS, micro_batch=1, context=4),
    "context 4, gather": Layout(RANKS, micro_batch=1, context=4, context_method="gather"),
    "pipeline 2, tensor 2, expert 2": Layout(RANKS, 2, micro_batch=1, pipeline=2, tensor=2),
}
KINDS = ("dispatch", "pipeline", "sequence", "balance")


def print_table() -> None:
    """Print a row per layout: median step, spread, and MB that all ranks send per step."""
    print(f"| layout of {RANKS} processes | step, ms | spread | {' | '.join(f'{kind}, MB' for kind in KINDS)} |")
    print("|---|---|---|" + "---|" * len(KINDS))
    pool = WorkerPool(RANKS, time_limit=300)
    for name, layout in LAYOUTS.items():
        records = pool.run(train, SETTING, layout)[0].records
        tokens = 8 * SETTING.seq_len
        times = [tokens / record["throughput/tokens_per_second"] * 1e3 for record in records[SKIPPED:STEPS]]
        spread = (max(times) - min(times)) / statistics.median(times)
        sent = [records[STEPS - 1].get(f"comm/{kind}_bytes", 0.0) / 1e6 for kind in KINDS]
        cells = [f"{megabytes:.3g}" if megabytes else "–" for megabytes in sent]
        print(f"| {name} | {statistics.median(times):.0f} | {spread:.0%} | {' | '.join(cells)} |", flush=True)
    pool.close()


if __name__ == "__main__":
    # Workers unpickle by module names, and __main__ is not one there.
    from tests.layout_costs import print_table as print_table_of_module

    print_table_of_module()
