"""Rules between sections of the configuration, checked before anything expensive starts."""

from __future__ import annotations

from moepp.config.plan import RunPlan, make_plan
from moepp.config.schema import Config, require


def validate(cfg: Config, world_size: int) -> RunPlan:
    """Check every rule that involves several sections or the number of ranks; return the numbers that follow.

    Raises:
        ConfigError: names the values, the rule and the remedy.
    """
    plan = make_plan(cfg, world_size)
    _validate_parallel(cfg, plan)
    _validate_batch(cfg, plan)
    require(
        not cfg.eval.tasks or cfg.data.tokenizer is not None,
        f"eval.tasks={list(cfg.eval.tasks)} needs a tokenizer and data.tokenizer is null; set data.tokenizer",
    )
    require(
        cfg.data.seq_len <= cfg.model.max_seq_len,
        f"data.seq_len={cfg.data.seq_len} is longer than model.max_seq_len={cfg.model.max_seq_len}; "
        "lower data.seq_len or raise model.max_seq_len",
    )
    return plan


def _validate_parallel(cfg: Config, plan: RunPlan) -> None:
    world_size, stage = plan.world_size, plan.zero_stage
    ep, experts = cfg.parallel.expert, cfg.model.moe.num_ffn_experts
    require(
        world_size % ep == 0,
        f"parallel.expert={ep} does not divide the {world_size} processes; start a multiple of {ep} processes "
        "or lower parallel.expert",
    )
    require(
        ep <= max(experts, 1),
        f"parallel.expert={ep} exceeds model.moe.num_ffn_experts={experts}, so some ranks would hold no expert; "
        "lower parallel.expert",
    )
    require(
        experts % ep == 0,
        f"parallel.expert={ep} does not divide model.moe.num_ffn_experts={experts}; "
        "change one of them so that every rank holds the same number of experts",
    )
    parts = cfg.parallel.exchange_chunks
    require(
        parts == 1 or ep > 1,
        f"parallel.exchange_chunks={parts} needs experts on several ranks and parallel.expert=1; "
        "set parallel.exchange_chunks=1 or raise parallel.expert",
    )
    require(
        parts == 1 or (experts // ep > 0 and experts // ep % parts == 0),
        f"parallel.exchange_chunks={parts} does not divide the {experts // ep} FFN experts of each rank "
        f"(model.moe.num_ffn_experts={experts}, parallel.expert={ep}); lower parallel.exchange_chunks",
    )
    require(
        cfg.engine.name != "native" or stage == 0,
        f"parallel.zero_stage={stage} is not supported by engine=native; set it to 0 or use engine=deepspeed",
    )
    require(
        not (cfg.engine.name == "deepspeed" and stage == 0 and cfg.train.precision == "bf16"),
        "parallel.zero_stage=0 with train.precision=bf16 has no fp32 gradient accumulation in DeepSpeed; "
        "set parallel.zero_stage=1, or use engine=native",
    )


def _validate_batch(cfg: Config, plan: RunPlan) -> None:
    total, micro, world_size = cfg.train.global_batch_size, plan.micro_batch_size, plan.world_size
    require(
        total % (micro * world_size) == 0,
        f"train.global_batch_size={total} is not divisible by micro_batch_size {micro} x {world_size} processes; "
        f"make it a multiple of {micro * world_size}, or change train.micro_batch_size",
    )
