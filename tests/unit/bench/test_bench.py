"""`moepp bench`: its timing, its routing, its tables, and that every benchmark runs on tiny shapes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from moepp.bench import comm, custom_op, layouts, train
from moepp.bench.cases import CASES, Case, ForcedRouting, balanced_logits, learn_balance, make_layer, random_tokens
from moepp.bench.layer import bare_forward, bare_forward_backward
from moepp.bench.memory import measure_memory
from moepp.bench.processes import run_processes
from moepp.bench.stages import OTHER, attribute
from moepp.bench.tables import format_table
from moepp.bench.timing import measure, summarize
from moepp.bench.train import OURS, Options, Step
from moepp.cli.bench import _QUICK_LAYOUT
from moepp.cli.main import main
from moepp.config import make_plan
from moepp.distributed.layout import Layout as RankLayout
from moepp.errors import ConfigError, RunError
from moepp.ops import use_kernels
from moepp.ops.backend import cpu_kernels
from moepp.training.estimate import traffic
from tests.dist import WorkerPool

CPU = torch.device("cpu")


def test_contestants_take_turns_and_each_is_charged_its_own_time():
    now, calls = [0.0], []

    def runner(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    contestants = {"slow": runner("slow", 0.3), "fast": runner("fast", 0.1)}
    timings = measure(contestants, rounds=3, clock=lambda: now[0], warmup=1, before=runner("before", 5.0))
    assert calls == ["before", "slow", "before", "fast"] * 4
    assert timings["slow"].median == pytest.approx(300) and timings["fast"].median == pytest.approx(100)
    assert timings["slow"].spread == pytest.approx(0)


def test_summary_is_median_and_quartiles():
    timing = summarize([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)
    assert timing.spread == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["8+4", "32+8"])
@pytest.mark.parametrize("tau", [0.1, 0.75])
def test_forced_routing_has_the_shares_of_the_balanced_optimum(name, tau):
    case = CASES[name]
    cfg = case.config(tau)
    chosen = torch.topk(balanced_logits(cfg, 20_000), 2, dim=-1).indices
    share = torch.bincount(chosen.flatten(), minlength=cfg.num_experts) / chosen.numel()
    wanted = torch.ones(cfg.num_experts)
    wanted[: cfg.num_ffn_experts] = tau
    torch.testing.assert_close(share, wanted / wanted.sum(), rtol=0.05, atol=0)
    # So the FFN assignments per token are those of the limit.
    assert float(share[: cfg.num_ffn_experts].sum()) == pytest.approx(1 / case.limit(tau), rel=0.02)


def test_the_layer_follows_forced_routing_and_its_own_afterwards():
    layer = make_layer(CASES["quick"], 0.5, torch.float32, CPU)
    x = random_tokens(512, 128, torch.float32, CPU)
    own = layer(x).stats.ffn_per_token
    with ForcedRouting(layer, 512):
        assert float(layer(x).stats.ffn_per_token) == pytest.approx(2 / CASES["quick"].limit(0.5), rel=0.1)
    assert torch.equal(layer(x).stats.ffn_per_token, own)


def test_a_router_trained_on_the_balance_loss_alone_comes_near_its_optimum():
    layer = make_layer(CASES["quick"], 0.25, torch.float32, CPU)
    x = random_tokens(512, 128, torch.float32, CPU)
    learn_balance(layer, x.detach(), lr=1e-3)
    assert float(layer(x).stats.ffn_per_token) == pytest.approx(2 / CASES["quick"].limit(0.25), rel=0.15)


def test_bare_products_have_the_operations_of_the_experts():
    from torch.utils.flop_counter import FlopCounterMode

    case = CASES["quick"]
    layer = make_layer(case, None, torch.float32, CPU)
    for build, factor in ((bare_forward, 1), (bare_forward_backward, 3)):
        run = build(layer, 256)
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == factor * case.expert_flops(256)


def event(
    name: str, elapsed: float, sequence_nr: int = -1, children: tuple = (), kernels: float = 0.0, **fields: Any
) -> SimpleNamespace:
    """An event of the profiler; ``kernels``: time of what it launched itself."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(elapsed_us=lambda: elapsed),
        sequence_nr=sequence_nr,
        cpu_children=list(children),
        self_device_time_total=kernels,
        device_time_total=kernels + sum(child.device_time_total for child in children),
        **({"device_type": DeviceType.CPU} | fields),
    )


def test_stages_add_up_to_the_whole_and_backward_goes_to_the_stage_of_its_forward():
    inner = event("aten::mm", 1, sequence_nr=7)
    stage = event("stage: FFN", 4000, children=(event("wrapper", 2, children=(inner,)),))
    backward = "autograd::engine::evaluate_function: "
    events = [event("whole", 20_000), stage, event(backward + "MmBackward", 9000, 7), event(backward + "Sum", 500, 99)]
    times = attribute(events, repeats=2)
    assert times == {"FFN": (2.0, 4.5), OTHER: (3.25, 0.25)}
    assert sum(map(sum, times.values())) == 10.0


def test_stages_of_an_accelerator_are_the_times_of_kernels_not_of_launches():
    mm = event("aten::mm", 1, sequence_nr=7, kernels=3000)
    stage = event("stage: FFN", 20, children=(mm,))
    loss = event("aten::sum", 2, kernels=600)
    whole = event("whole", 50, children=(stage, loss))
    node = event("aten::mm", 1, kernels=9000)
    backward = event("autograd::engine::evaluate_function: MmBackward", 30, 7, (node,))  # in a thread of its own
    on_device = event("stage: FFN", 3000, device_type=DeviceType.CUDA)  # the annotation's copy
    events = [whole, stage, mm, loss, backward, node, on_device]
    times = attribute(events, repeats=2, on_device=True)
    assert times == {"FFN": (1.5, 4.5), OTHER: (pytest.approx(0.3), 0.0)}
    assert sum(map(sum, times.values())) == pytest.approx((3000 + 600 + 9000) / 2 / 1e3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [None, 0.5])
def test_memory_of_the_layer_is_what_its_sizes_say(tau, dtype):
    """A buffer made for all assignments instead of the FFN ones, or kept too long, shows here on every machine."""
    record = measure_memory(Case("medium", 4, 2, 256, 512), tau, 2048, dtype, CPU)
    routing_mb = 2048 * 200 / 2**20  # some numbers per expert and token
    assert record["saved formula MB"] <= record["saved MB"] <= record["saved formula MB"] + routing_mb
    assert record["peak MB"] == pytest.approx(record["peak formula MB"], rel=0.05)


def _killed(rank: int, world_size: int) -> int:
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def test_a_killed_benchmark_process_is_reported_instead_of_waited_for():
    with pytest.raises(RunError, match="rank 0 of 1 ended with signal 9"):
        run_processes(_killed, 1)


def test_table_aligns_numbers_and_shows_what_is_absent():
    text = format_table([{"name": "a", "ms": 1.5, "n": 1200}, {"name": "long name", "ms": None, "skipped": "why"}])
    assert text.splitlines() == [
        "name          ms      n  skipped",
        "---------  -----  -----  -------",
        "a          1.500  1,200  -",
        "long name      -      -  why",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--cases", "9+9"], "--cases 9+9 is not one of"),
        (["layer", "--taus", "0"], "--taus 0.0 must be greater than 0"),
        (["peers", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["layer", "--threads", "0"], "--threads 0 must be at least 1"),
        (["train", "--threads", "100000"], "--threads 100000 must be at most"),
        (["comm", "--ep", "3"], "--ep 3 must be at least 2 and divide the 8 experts"),
        (["layer", "--json", "no/such/folder/x.json"], "is not a directory"),
        (["train", "--plot", "x.png"], "add --scaling"),
        (["train", "--hidden-size", "100", "--num-heads", "3"], "not divisible"),
        (["layer", "--kernels", "c"], "invalid choice"),
        (["sleep"], "invalid choice"),
        ([], "BENCHMARK"),
    ],
)
def test_wrong_arguments_give_one_line_before_any_work(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_kernels_are_those_that_can_run_and_that_were_asked_for(without_interpreter, monkeypatch, tmp_path, capsys):
    for benchmark in ("layer", "peers", "comm", "train"):
        assert main(["bench", benchmark, "--quick", "--device", "cpu", "--kernels", "triton"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --kernels triton, but") and error.count("\n") == 1
    with use_kernels("auto"):  # the choice is the process's
        settings = run_quick("layer", tmp_path, "--threads", "1", "--kernels", "torch", "--device", "cpu")["settings"]
    assert (settings["kernels"], settings["experts"]) == ("torch", "loop")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = []
    monkeypatch.setattr("moepp.bench.train.choose_kernels", lambda *choice: chosen.append(choice))
    monkeypatch.setattr("moepp.bench.train.build_groups", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Step(OURS, Options(dtype=torch.float32, device=CPU, num_layers=1, hidden_size=16, num_heads=2, kernels="torch"))
    assert chosen == [("torch", CPU)], "a started process chooses anew"


def test_each_rank_of_an_exchange_needs_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    comm.require_devices(CPU, 4)
    comm.require_devices(torch.device("cuda"), 1)
    with pytest.raises(ConfigError, match=r"--ep 4 needs 4 devices of type cuda, and there are 1; .*--device cpu"):
        comm.require_devices(torch.device("cuda"), 4)


def _in_worker(rank: int, work: Callable[..., Any], world_size: int, *args: Any) -> Any:
    return work(rank, world_size, *args)


@pytest.fixture
def started_before(pools: Callable[[int], WorkerPool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a benchmark are those of tests/dist.py, which have imported everything.

    How it starts its own, others find out: test_quick_exchange_benchmark_sends_exactly_the_formula.
    """

    def run(work: Callable[..., Any], world_size: int, *args: Any, **_: Any) -> list[Any]:
        return pools(world_size).run(_in_worker, work, world_size, *args, time_limit=240)

    for module in (layouts, train):
        monkeypatch.setattr(module, "run_processes", run)


def run_quick(benchmark: str, tmp_path: Path, *arguments: str) -> dict:
    target = tmp_path / "out.json"
    assert main(["bench", benchmark, "--quick", "--json", str(target), *arguments]) == 0
    return json.loads(target.read_text())


def test_quick_layer_benchmark(tmp_path, capsys):
    tables = run_quick("layer", tmp_path, "--threads", "1")["tables"]
    rows = {(row["pass"], row["layer"]): row for row in tables["times"]}
    assert {layer for _, layer in rows} == {"bare matmuls", "vanilla", "MoE++", "MoE++ learned"}
    for row in rows.values():
        assert row["ms"] > 0
    forced = rows["forward", "MoE++"]
    assert forced["limit"] == pytest.approx(2 / forced["ffn/token"])
    assert forced["share of limit"] == pytest.approx(forced["speed-up"] / forced["limit"])
    for layer in ("vanilla", "MoE++"):
        stages = {row["stage"]: row for row in tables["stages"] if row["layer"] == layer}
        assert {"router", "select", "permute", "FFN", "combine", OTHER, "whole"} <= set(stages)
        assert sum(row["share"] for name, row in stages.items() if name != "whole") == pytest.approx(1)
        assert stages["FFN"]["backward ms"] > 0
    assert "share of limit" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_exchange_benchmark_sends_exactly_the_formula(tmp_path):
    tables = run_quick("comm", tmp_path, "--ep", "2")["tables"]
    rows = {row["experts"]: row for row in tables["exchange"]}
    assert set(rows) == {"vanilla", "MoE++", "all sharded"} and all(row["equals formula"] for row in rows.values())
    # Of the vanilla bytes MoE++ sends the FFN share (1/3 at tau 0.5 of 4+4), sharding everything saves nothing.
    assert rows["MoE++"]["x vanilla"] == pytest.approx(1 / 3, rel=0.1)
    assert rows["all sharded"]["x vanilla"] == pytest.approx(1, rel=0.1)
    ways = {"blocking", "beside zero-computation experts", "in 2 chunks"}
    assert {row["exchange"] for row in tables["overlap"]} == ways
    assert [row["gradients summed"] for row in tables["gradients"]] == ["after backward", "during backward"]


@pytest.mark.slow
def test_quick_metrics_benchmark_measures_what_it_names(tmp_path):
    tables = run_quick("metrics", tmp_path)["tables"]
    rows = {row["measured"]: row for row in tables["metrics"]}
    assert list(rows) == ["nothing", "between records", "record, brief", "record, detailed"]
    assert rows["nothing"]["x nothing"] == 1 and all(row["step ms"] > 0 for row in rows.values())
    for name in ("record, brief", "record, detailed"):
        expected = 100 * (0.9 * rows["between records"]["x nothing"] + 0.1 * rows[name]["x nothing"] - 1)
        assert rows[name]["overhead, a record every 10 steps, %"] == pytest.approx(expected)
    brief, detailed = tables["wandb"]
    assert 0 < brief["keys"] < detailed["keys"] and brief["ms of processor time per record"] > 0


@pytest.mark.slow
def test_quick_peers_benchmark_agrees_with_every_peer_that_runs(tmp_path):
    pytest.importorskip("transformers")
    rows = run_quick("peers", tmp_path, "--threads", "1")["tables"]["peers"]
    timed = [row for row in rows if "skipped" not in row]
    assert {"moepp", "plain loop", "transformers eager"} <= {row["peer"] for row in timed}
    assert all(row["difference"] < 0.02 for row in timed), "same weights, same tokens, same output"
    assert all(row["skipped"] for row in rows if "skipped" in row)


@pytest.mark.slow
def test_quick_train_benchmark_with_scaling_and_plot(started_before, tmp_path):
    pytest.importorskip("transformers")
    tables = run_quick("train", tmp_path, "--threads", "1", "--scaling", "--plot", str(tmp_path / "p.png"))["tables"]
    rows = {row["contestant"]: row for row in tables["step"]}
    assert {"moepp MoE++", "moepp vanilla", "transformers eager"} <= set(rows)
    for row in rows.values():
        parts = [row[f"{stage} ms"] for stage in ("forward", "backward", "optimizer")]
        assert sum(parts) == pytest.approx(row["step ms"], rel=0.2) and row["peak MB"] > 100
    assert {row["varied"] for row in tables["scaling"]} == {
        "sequence length",
        "tokens per rank",
        "FFN experts",
        "layers",
    }
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
def test_quick_layouts_send_what_the_formulas_say(started_before, tmp_path):
    rows = {row["layout"]: row for row in run_quick("layouts", tmp_path, "--device", "cpu")["tables"]["layouts"]}
    plain, sharded, fsdp = rows["DP 4"], rows["DP 4, ZeRO-1"], rows["DP 4, FSDP2 (ZeRO-3)"]
    elements = plain["parameters held M"]
    balance_and_norm = 0.01  # MB
    assert plain["all-reduce MB"] == pytest.approx(8 * elements * 3 / 4, abs=balance_and_norm)
    padding = 1.02  # of shares of buckets
    assert 1 <= sharded["reduce-scatter MB"] / (4 * elements * 3 / 4) < padding
    assert 1 <= sharded["all-gather MB"] / (2 * elements * 3 / 4) < padding
    assert fsdp["reduce-scatter MB"] == pytest.approx(2 * 4 * elements * 3 / 4, rel=0.02)  # of two micro-batches
    assert fsdp["parameters held M"] == pytest.approx(elements / 4, rel=0.02)
    options = layouts.Options(**_QUICK_LAYOUT)
    for name in ("DP 4, FSDP2 (ZeRO-3)", "EP 4, FSDP2"):  # a pipeline's first stage gathers its ends once more at times
        cfg = options.config(layouts.LAYOUTS[name])
        formula = traffic(cfg, make_plan(cfg, 4), RankLayout.of(cfg.parallel, 4), 0).gradients / 1e6
        assert rows[name]["reduce-scatter MB"] + rows[name]["all-gather MB"] == pytest.approx(formula, rel=0.02), name
    [micro_batches, stage] = 4, rows["PP 2 interleaved x DP 2, FSDP2"]
    assert stage["reduce-scatter MB"] == pytest.approx(micro_batches * 4 * stage["parameters held M"], rel=0.02)
    assert rows["PP 4"]["send MB"] > 0 == rows["EP 4"]["send MB"]
    assert rows["EP 4"]["all-to-all MB"] > 0 == plain["all-to-all MB"]


def test_kernel_as_a_custom_operation_is_the_same_operation():
    if cpu_kernels(torch.empty(0)) is None:
        pytest.skip("no compiled kernels")
    found = {}
    for way, call in custom_op.WAYS.items():
        logits = torch.randn(33, custom_op.EXPERTS, generator=torch.Generator().manual_seed(3)).requires_grad_()
        results = call(logits)
        custom_op.run_gates(way, logits)
        assert logits.grad is not None and logits.grad.abs().mean() > 1e-3
        found[way] = (*results, logits.grad)
    for ours, other in zip(*found.values(), strict=True):
        assert torch.equal(ours, other)
