"""What every engine promises besides the numbers of tests/dist/test_parity.py: rejected steps, masters, state."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from moepp.bench import layouts
from moepp.config import EngineConfig, make_plan
from moepp.distributed import comm
from moepp.distributed.layout import Layout as RankLayout
from moepp.engine.deepspeed import DeepSpeedEngine, _local_rank, _zero_config, require_accelerator
from moepp.engine.engine import StepResult
from moepp.errors import ConfigError
from moepp.training.build import build_engine, build_model
from moepp.training.estimate import traffic
from tests.parity import Layout, Setting, group_of, make_config, make_data

Tensor = torch.Tensor
ENGINES = [("native", 0), ("native", 1), ("fsdp", 3), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
BF16_ENGINES = [engine for engine in ENGINES if engine != ("deepspeed", 0)]  # refused: no fp32 accumulation there
# Of FSDP2 the model's parameters are the masters themselves, in shares.
MASTERS_ASIDE = [engine for engine in BF16_ENGINES if engine != ("fsdp", 3)]


class Run:
    """One rank's model and engine, stepped by hand."""

    def __init__(
        self, setting: Setting, layout: Layout, precision: str = "fp32", settings: EngineConfig | None = None
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        cfg, groups = make_config(setting, layout), group_of(layout.ep)
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))
        if settings is not None:
            cfg = dataclasses.replace(cfg, engine=settings)
        plan = make_plan(cfg, groups.world_size)
        self.model = build_model(cfg, groups, comm.CommStats())
        self.engine = build_engine(cfg, plan, self.model, groups)
        self.data = make_data(cfg, plan, groups.rank)
        self.losses: list[float] = []

    def step(self, batch: int, lr: float = 0.05, times: float = 1.0, update: bool = True) -> StepResult:
        """One optimizer step on a global batch with the loss of this rank multiplied by ``times``."""
        for micro_step in range(self.data.plan.accumulation_steps):
            out = self.model.loss(*self.data.train_batch(batch, micro_step))
            self.losses.append(float(out.ce_sum) / int(out.num_tokens))
            self.engine.backward((out.ce_sum / out.num_tokens + out.aux_loss) * times)
        return self.engine.step(lr, update)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {key: value.detach().clone() for key, value in entry.items()}
            for name, entry in self.engine.read_state()
        }


def _assert_same_bits(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].keys() == second[name].keys()
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), (name, key)


def _held(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _reject_a_step(rank: int, layout: Layout, precision: str, how: str) -> tuple[StepResult, StepResult]:
    """A rejected step must leave no trace: the steps around it give the bits that they give without it."""
    setting = Setting("adamw")
    plain, other = Run(setting, layout, precision), Run(setting, layout, precision)
    for run in (plain, other):
        run.step(0)
    before = other.state()
    if how == "on request":
        rejected = other.step(1, update=False)
    else:  # the gradient of the last rank alone is not finite
        rejected = other.step(1, times=math.inf if rank == layout.ranks - 1 else 1.0)
    _assert_same_bits(before, other.state())
    first, second = plain.step(2), other.step(2)
    assert first == second
    _assert_same_bits(plain.state(), other.state())
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(_held(parameter), _held(other.model.get_parameter(name))), name
    return rejected, second


@pytest.mark.parametrize("how", ["on request", "for one rank's gradient"])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_rejected_step_leaves_no_trace_on_any_rank(pool_2, engine, how):
    for micro_batch in (None, 2):
        results = pool_2.run(_reject_a_step, Layout(2, 2, *engine, micro_batch=micro_batch), "fp32", how)
        for rejected, accepted in results:
            assert rejected.skipped and not accepted.skipped and math.isfinite(accepted.grad_norm)
            if how != "on request":
                assert not math.isfinite(rejected.grad_norm)


@pytest.mark.parametrize("engine", BF16_ENGINES, ids=str)
def test_rejected_step_leaves_no_trace_in_bf16(pool_2, engine):
    for how in ("on request", "for one rank's gradient"):
        for rejected, accepted in pool_2.run(_reject_a_step, Layout(2, 2, *engine, micro_batch=2), "bf16", how):
            assert rejected.skipped and not accepted.skipped


def _moments_of_first_step(rank: int, layout: Layout) -> None:
    run = Run(Setting("adamw"), layout)
    run.step(0)
    state, shapes = run.state(), {name: p.shape for name, p in run.model.named_parameters()}
    assert list(state) and state.keys() == shapes.keys()
    for name, entry in state.items():
        assert entry.keys() == {"fp32", "exp_avg", "exp_avg_sq", "step"}
        assert all(entry[key].shape == shapes[name] for key in ("fp32", "exp_avg", "exp_avg_sq")), name
        assert float(entry["step"]) == 1
        # (1 - beta1) g and (1 - beta2) g^2 after one step: the state belongs to its parameter.
        gradient = entry["exp_avg"] / 0.1
        torch.testing.assert_close(entry["exp_avg_sq"], 0.05 * gradient**2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_state_names_every_parameter_with_its_own_moments(pool_2, engine):
    pool_2.run(_moments_of_first_step, Layout(2, 2, *engine))


def _move_bf16_masters(rank: int, layout: Layout) -> tuple[float, float]:
    """How far all masters are from their start after 1 and after 20 steps too small for most bf16 weights to show."""
    run = Run(Setting("sgd", grad_clip=None), layout, "bf16")
    start = {name: entry["fp32"] for name, entry in run.state().items()}
    moved = []
    for step in range(20):
        run.step(0, lr=1e-4)
        if step in (0, 19):
            state = run.state()
            moved.append(sum(float((state[name]["fp32"] - start[name]).abs().sum()) for name in start))
    shown = sum(float((p.float() - start[name]).abs().sum()) for name, p in run.model.named_parameters())
    assert 0 < shown != moved[1]
    for name, entry in run.state().items():
        parameter = run.model.get_parameter(name)
        assert parameter.dtype == torch.bfloat16 and entry["fp32"].dtype == torch.float32
        assert torch.equal(entry["fp32"].bfloat16(), parameter), name
    return moved[0], moved[1]


@pytest.mark.parametrize("engine", MASTERS_ASIDE, ids=str)
def test_bf16_masters_add_up_updates_that_the_weights_cannot_show(pool_2, engine):
    for once, twenty_times in pool_2.run(_move_bf16_masters, Layout(2, 2, *engine)):
        assert twenty_times == pytest.approx(20 * once, rel=0.03)


def _losses(rank: int, layout: Layout, precision: str) -> list[float]:
    run = Run(Setting("adamw"), layout, precision)
    for step in range(20):
        run.step(step, lr=0.005)
    return [float(sum(loss)) for loss in zip(*comm.gather_objects(run.losses), strict=True)]


@pytest.mark.parametrize("engine", BF16_ENGINES, ids=str)
def test_bf16_trains_near_fp32(pool_2, engine):
    [wanted, _] = pool_2.run(_losses, Layout(2, 2), "fp32")
    [observed, _] = pool_2.run(_losses, Layout(2, 2, *engine), "bf16")
    assert wanted[-1] < wanted[0] - 0.5
    # bf16 keeps 8 bits, and a choice of experts may flip. Measured: 0.3 percent.
    torch.testing.assert_close(torch.tensor(observed), torch.tensor(wanted), rtol=1e-2, atol=0)


SMALL_BUCKETS = EngineConfig(overlap_comm=True, reduce_bucket_size=500, allgather_bucket_size=512)


@pytest.mark.parametrize(
    ("stage", "precision", "micro_batch"),
    [
        (2, "bf16", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, "fp32", 2), (1, "fp32", None)]),
    ],
)
def test_overlap_and_buckets_of_deepspeed_change_no_bit(pool_2, stage, precision, micro_batch):
    """In every combination that the configuration allows."""
    layout = Layout(2, 2, "deepspeed", stage, micro_batch=micro_batch)
    for same, sizes in pool_2.run(_bucket_settings_agree, layout, precision):
        assert same and sizes == (True, 500, 512)  # they have reached DeepSpeed


def _bucket_settings_agree(rank: int, layout: Layout, precision: str) -> tuple[bool, tuple[bool, int, int]]:
    states = []
    for settings in (EngineConfig(), SMALL_BUCKETS):
        run = Run(Setting(), layout, precision, settings)
        for batch in range(2):
            run.step(batch)
        states.append(run.state())
    first, second = states
    same = all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])
    zero = run.engine._engine.optimizer  # pyright: ignore
    return same, (zero.overlap_comm, zero.reduce_bucket_size, zero.allgather_bucket_size)


def test_communication_overlaps_as_the_settings_say():
    default = _zero_config(1, EngineConfig(), overlaps=True)
    assert default["overlap_comm"] and not _zero_config(1, EngineConfig(), overlaps=False)["overlap_comm"]
    assert not _zero_config(1, EngineConfig(overlap_comm=False), overlaps=True)["overlap_comm"]
    assert default["reduce_bucket_size"] == 50_000_000 and _zero_config(0, EngineConfig(), True) == {"stage": 0}


SMALL = layouts.Options(num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=128, seq_len=16, rounds=1)


def _sent(rank: int, options: layouts.Options, layout: dict[str, Any], world_size: int) -> Counter[str]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return layouts._measure(options, layout, rank, world_size)["bytes"]


@pytest.mark.parametrize(("engine", "stage"), [("native", 0), ("native", 1), ("deepspeed", 1), ("deepspeed", 2)])
def test_the_plan_says_what_sums_of_gradients_send(pool_2, engine, stage):
    """In four micro-batches: of one, ZeRO-1 and ZeRO-2 of DeepSpeed would look alike."""
    layout = {"engine": engine, "zero_stage": stage}
    cfg, balance_and_norms = SMALL.config(layout), 3000
    assert make_plan(cfg, 2).accumulation_steps == 4
    formula = traffic(cfg, make_plan(cfg, 2), RankLayout.of(cfg.parallel, 2), 0).gradients
    for sent in pool_2.run(_sent, SMALL, layout, 2):
        assert formula <= sent.total() <= 1.02 * formula + balance_and_norms


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_deepspeeds_own_device_may_not_contradict_the_runs(monkeypatch, kind):
    monkeypatch.setenv("DS_ACCELERATOR", kind)
    require_accelerator(torch.device(kind))
    with pytest.raises(ConfigError, match=f"DS_ACCELERATOR={kind}, but this run computes on xpu"):
        require_accelerator(torch.device("xpu"))
    monkeypatch.delenv("DS_ACCELERATOR")
    require_accelerator(torch.device("xpu"))


@pytest.mark.parametrize("given", ["5", None])
def test_deepspeed_makes_the_ranks_own_device_current(monkeypatch, given):
    """Not the one that LOCAL_RANK names, which is another where each process sees one device."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if given is not None:
        monkeypatch.setenv("LOCAL_RANK", given)
    with _local_rank(torch.device("cuda", 0)):
        assert os.environ["LOCAL_RANK"] == "0"
    with _local_rank(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == (given or "0")
    assert os.environ.get("LOCAL_RANK") == given


def test_engine_refuses_an_unknown_zero_stage(pool_2):
    for message in pool_2.run(_build_with_zero_3, raises=ConfigError):
        assert "zero_stage=3" in message


def _build_with_zero_3(rank: int) -> None:
    cfg, groups = make_config(Setting(), Layout(2, 2)), group_of(2)
    DeepSpeedEngine(build_model(cfg, groups, comm.CommStats()), groups, cfg.optim, 1, 1, zero_stage=3)
