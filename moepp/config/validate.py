"""Rules between sections of the configuration, checked before anything expensive starts."""

from __future__ import annotations

from moepp.config.schema import Config, require


def micro_batch_size(cfg: Config, world_size: int) -> int:
    """Sequences per rank and forward pass."""
    if cfg.train.micro_batch_size is not None:
        return cfg.train.micro_batch_size
    return max(cfg.train.global_batch_size // world_size, 1)


def accumulation_steps(cfg: Config, world_size: int) -> int:
    """Forward passes per rank and optimizer step."""
    return cfg.train.global_batch_size // (micro_batch_size(cfg, world_size) * world_size)


def zero_stage(cfg: Config) -> int:
    """The ZeRO stage in force: the asked one, or the engine's default."""
    if cfg.parallel.zero_stage is not None:
        return cfg.parallel.zero_stage
    return 1 if cfg.engine.name == "deepspeed" else 0


def validate(cfg: Config, world_size: int) -> None:
    """Check every rule that involves several sections or the number of ranks.

    Raises:
        ConfigError: names the values, the rule and the remedy.
    """
    _validate_parallel(cfg, world_size)
    _validate_batch(cfg, world_size)
    require(
        not cfg.eval.tasks or cfg.data.tokenizer is not None,
        f"eval.tasks={list(cfg.eval.tasks)} needs a tokenizer and data.tokenizer is null; set data.tokenizer",
    )
    require(
        cfg.data.seq_len <= cfg.model.max_seq_len,
        f"data.seq_len={cfg.data.seq_len} is longer than model.max_seq_len={cfg.model.max_seq_len}; "
        "lower data.seq_len or raise model.max_seq_len",
    )


def _validate_parallel(cfg: Config, world_size: int) -> None:
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
    stage = zero_stage(cfg)
    require(
        cfg.engine.name != "native" or stage == 0,
        f"parallel.zero_stage={stage} is not supported by engine=native; set it to 0 or use engine=deepspeed",
    )
    require(
        not (cfg.engine.name == "deepspeed" and stage == 0 and cfg.train.precision == "bf16"),
        "parallel.zero_stage=0 with train.precision=bf16 has no fp32 gradient accumulation in DeepSpeed; "
        "set parallel.zero_stage=1, or use engine=native",
    )


def _validate_batch(cfg: Config, world_size: int) -> None:
    total, micro = cfg.train.global_batch_size, micro_batch_size(cfg, world_size)
    require(
        total % (micro * world_size) == 0,
        f"train.global_batch_size={total} is not divisible by micro_batch_size {micro} x {world_size} processes; "
        f"make it a multiple of {micro * world_size}, or change train.micro_batch_size",
    )
