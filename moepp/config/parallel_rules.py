"""Rules of ``parallel.*``: which layouts fit the ranks, the model and the batch.

Each message names the value, the rule and a layout that would work.
"""

from __future__ import annotations

import math

from moepp.config.plan import RunPlan
from moepp.config.require import require
from moepp.config.schema import Config, EngineConfig
from moepp.config.stages import split_layers


def validate_parallel(cfg: Config, world_size: int) -> None:
    """Rules that need no plan, which itself is made for layouts that divide the ranks.

    Raises:
        ConfigError: names the values, the rule and the remedy.
    """
    _validate_axes(cfg, world_size)
    _validate_experts(cfg, world_size)
    _validate_exchange(cfg)
    _validate_pipeline(cfg)
    _validate_sequence(cfg)
    _validate_engine(cfg)


def validate_work(cfg: Config, plan: RunPlan) -> None:
    """Rules of the batch and of what the layout must be able to run; errors as of :func:`validate_parallel`."""
    _validate_batch(cfg, plan)
    _validate_micro_batches(cfg, plan)
    _validate_zero_stage(cfg, plan)
    _validate_deepspeed(cfg, plan)


def _validate_axes(cfg: Config, world_size: int) -> None:
    parallel = cfg.parallel
    shared = parallel.pipeline * parallel.context * parallel.tensor
    factors = {key: getattr(parallel, key) for key in ("pipeline", "context", "tensor")}
    named = " x ".join(f"parallel.{key}={size}" for key, size in factors.items() if size > 1)
    more = -(-world_size // shared) * shared
    require(
        world_size % shared == 0,
        f"{named}{f' = {shared}' if sum(size > 1 for size in factors.values()) > 1 else ''} does not divide the "
        f"{world_size} processes; start {more} processes, or choose sizes whose product divides {world_size}",
    )


def _validate_experts(cfg: Config, world_size: int) -> None:
    ep, experts = cfg.parallel.expert, cfg.model.moe.num_ffn_experts
    stage_size = world_size // cfg.parallel.pipeline
    of_stage = f" of a pipeline stage ({world_size} / parallel.pipeline={cfg.parallel.pipeline})"
    common = math.gcd(stage_size, experts) if experts else 1
    works = f"parallel.expert={_largest_divisor(common, ep)} would work"
    require(
        stage_size % ep == 0,
        f"parallel.expert={ep} does not divide the {stage_size} processes"
        f"{of_stage if cfg.parallel.pipeline > 1 else ''}; start a multiple of {ep * cfg.parallel.pipeline} processes "
        f"or lower parallel.expert: {works}",
    )
    require(
        ep <= max(experts, 1),
        f"parallel.expert={ep} exceeds model.moe.num_ffn_experts={experts}, so some ranks would hold no expert; "
        f"lower parallel.expert: {works}",
    )
    require(
        experts % ep == 0,
        f"parallel.expert={ep} does not divide model.moe.num_ffn_experts={experts}; "
        f"change one of them so that every rank holds the same number of experts: {works}",
    )


def _validate_exchange(cfg: Config) -> None:
    chunks, ep, experts = cfg.parallel.exchange_chunks, cfg.parallel.expert, cfg.model.moe.num_ffn_experts
    require(
        chunks == 1 or ep > 1,
        f"parallel.exchange_chunks={chunks} needs experts on several ranks and parallel.expert=1; "
        "set parallel.exchange_chunks=1 or raise parallel.expert",
    )
    require(
        chunks == 1 or (experts // ep > 0 and experts // ep % chunks == 0),
        f"parallel.exchange_chunks={chunks} does not divide the {experts // ep} FFN experts of each rank "
        f"(model.moe.num_ffn_experts={experts}, parallel.expert={ep}); lower parallel.exchange_chunks",
    )


def _validate_pipeline(cfg: Config) -> None:
    parallel, num_layers = cfg.parallel, cfg.model.num_layers
    pipeline, chunks, layers = parallel.pipeline, parallel.pipeline_chunks, parallel.pipeline_layers
    stages = pipeline * chunks
    if pipeline == 1:
        for key, default in (("schedule", "1f1b"), ("chunks", 1), ("layers", None)):
            value = getattr(parallel, f"pipeline_{key}")
            value = list(value) if isinstance(value, tuple) else value
            require(
                value == default,
                f"parallel.pipeline_{key}={value} needs a pipeline and parallel.pipeline=1; raise parallel.pipeline or "
                f"leave parallel.pipeline_{key} out",
            )
        return
    if parallel.pipeline_schedule == "interleaved":
        require(
            chunks > 1,
            f"parallel.pipeline_schedule=interleaved needs several stages per rank and parallel.pipeline_chunks="
            f"{chunks}; set parallel.pipeline_chunks=2, or parallel.pipeline_schedule=1f1b",
        )
    else:
        require(
            chunks == 1,
            f"parallel.pipeline_chunks={chunks} needs parallel.pipeline_schedule=interleaved, and it is 1f1b; set "
            "parallel.pipeline_chunks=1 or parallel.pipeline_schedule=interleaved",
        )
    require(
        num_layers >= stages,
        f"parallel.pipeline={pipeline} x parallel.pipeline_chunks={chunks} = {stages} stages need a layer each and "
        f"model.num_layers={num_layers}; lower parallel.pipeline to {max(num_layers // chunks, 1)} or less",
    )
    if layers is not None:
        example = [len(part) for part in split_layers(num_layers, stages)]
        require(
            len(layers) == stages and min(layers) >= 1 and sum(layers) == num_layers,
            f"parallel.pipeline_layers={list(layers)} must be {stages} numbers of at least 1 (parallel.pipeline x "
            f"parallel.pipeline_chunks) that sum to model.num_layers={num_layers}; for example {example}",
        )
    require(
        not cfg.model.tie_embeddings,
        f"model.tie_embeddings=true needs embedding and output layer on one rank and parallel.pipeline={pipeline} puts "
        "them on the first and the last; set model.tie_embeddings=false or parallel.pipeline=1",
    )
    _refuse_whole_model_work(cfg, f"parallel.pipeline={pipeline}")


def _refuse_whole_model_work(cfg: Config, layout: str) -> None:
    """Refuse samples, which need a whole model on a rank or an EP group."""
    require(
        cfg.train.samples == 0,
        f"train.samples={cfg.train.samples} draws from the whole model and {layout} splits it; set train.samples=0 and "
        "run `moepp generate` on the checkpoint afterwards",
    )
    require(
        not cfg.eval.tasks,
        f"eval.tasks={list(cfg.eval.tasks)} runs the whole model and {layout} splits it; set eval.tasks=[] and run "
        "`moepp eval` on the checkpoint afterwards",
    )


def _validate_sequence(cfg: Config) -> None:
    tensor, context, model = cfg.parallel.tensor, cfg.parallel.context, cfg.model
    method = cfg.parallel.context_method
    require(
        context > 1 or method == "ulysses",
        f"parallel.context_method={method} needs sequences over several ranks and parallel.context=1; raise "
        "parallel.context or leave parallel.context_method out",
    )
    if tensor * context == 1:
        return
    is_ulysses = method == "ulysses" and context > 1
    parts = tensor * context if is_ulysses else tensor
    named = f"parallel.tensor={tensor}" + (f" x parallel.context={context} (ulysses)" if is_ulysses else "")
    common = math.gcd(model.num_heads, model.num_kv_heads)
    fits = f"{'a product' if is_ulysses else 'parallel.tensor'} of {_largest_divisor(common, parts)} would work"
    for key in ("num_heads", "num_kv_heads"):
        heads = getattr(model, key)
        require(
            heads % parts == 0,
            f"{named} does not divide model.{key}={heads}: {fits}"
            + (", as would parallel.context_method=gather, which splits no heads" if is_ulysses else ""),
        )
    of, near = sequence_multiple(method, context, tensor), cfg.data.seq_len
    works = near // of * of or of
    require(
        near % of == 0,
        f"data.seq_len={near} is not a multiple of {of}, as parallel.context={context}"
        f"{f' ({method})' if context > 1 else ''} and parallel.tensor={tensor} need for equal parts of a sequence; "
        f"data.seq_len={works} would work",
    )
    _refuse_whole_model_work(cfg, f"parallel.tensor={tensor}, parallel.context={context}")


def sequence_multiple(method: str, context: int, tensor: int) -> int:
    """Return what sequences must be a multiple of for these context- and tensor-parallel ranks.

    Each context rank's part must be cut into ``tensor`` equal ones; gathered keys and values balance the causal work by
    giving each context rank an early and a late run, of equal lengths.
    """
    return context * math.lcm(tensor, 2 if method == "gather" and context > 1 else 1)


def _validate_engine(cfg: Config) -> None:
    for key in ("pipeline", "context", "tensor"):
        value = getattr(cfg.parallel, key)
        require(
            value == 1 or cfg.engine.name != "deepspeed",
            f"parallel.{key}={value} is not supported by engine=deepspeed; use engine=native, or parallel.{key}=1",
        )
    if cfg.engine.name == "fsdp":
        _refuse_whole_model_work(cfg, "engine=fsdp")


def _validate_batch(cfg: Config, plan: RunPlan) -> None:
    total, micro = cfg.train.global_batch_size, plan.micro_batch_size
    per_forward = micro * plan.data_size
    are = "processes" if plan.data_size == plan.world_size else "replicas"
    require(
        total % per_forward == 0,
        f"train.global_batch_size={total} is not divisible by micro_batch_size {micro} x {plan.data_size} {are}; "
        f"make it a multiple of {per_forward}, or change train.micro_batch_size",
    )


def _validate_micro_batches(cfg: Config, plan: RunPlan) -> None:
    pipeline, count = cfg.parallel.pipeline, plan.accumulation_steps
    if pipeline == 1:
        return
    said = (
        f"train.global_batch_size={cfg.train.global_batch_size} gives {count} micro-batches (of "
        f"{plan.micro_batch_size} sequences, on {plan.data_size} replicas)"
    )
    per_micro_batch = plan.micro_batch_size * plan.data_size
    works = f"train.global_batch_size={-(-count // pipeline) * pipeline * per_micro_batch} would work"
    require(
        count >= pipeline,
        f"{said} and parallel.pipeline={pipeline} needs at least as many as stages; {works}, or lower "
        "train.micro_batch_size",
    )
    require(
        cfg.parallel.pipeline_schedule != "interleaved" or count % pipeline == 0,
        f"{said} and parallel.pipeline_schedule=interleaved needs a multiple of parallel.pipeline={pipeline}; {works}",
    )


def _validate_zero_stage(cfg: Config, plan: RunPlan) -> None:
    stage = plan.zero_stage
    require(
        cfg.engine.name != "native" or stage <= 1,
        f"parallel.zero_stage={stage} is not supported by engine=native; set it to 0 or 1, or use "
        f"engine={'fsdp' if stage == 3 else 'deepspeed'}",
    )
    require(
        cfg.engine.name != "deepspeed" or stage <= 2,
        f"parallel.zero_stage={stage} is not supported by engine=deepspeed; set it to 0, 1 or 2, or use engine=fsdp",
    )
    require(
        cfg.engine.name != "fsdp" or stage == 3,
        f"parallel.zero_stage={stage} is not supported by engine=fsdp; set it to 3, or use engine=native for 0 and 1",
    )
    require(
        not (cfg.engine.name == "deepspeed" and stage == 0 and cfg.train.precision == "bf16"),
        "parallel.zero_stage=0 with train.precision=bf16 has no fp32 gradient accumulation in DeepSpeed; "
        "set parallel.zero_stage=1, or use engine=native",
    )


def _validate_deepspeed(cfg: Config, plan: RunPlan) -> None:
    """Refuse settings without effect: DeepSpeed's optimizer for bf16 and ZeRO 1 reduces after backward, at once."""
    stage, precision = plan.zero_stage, cfg.train.precision
    is_zero = cfg.engine.name == "deepspeed" and stage > 0
    is_bucketed = is_zero and (stage == 2 or precision == "fp32")
    for key, has_effect in (
        ("allgather_bucket_size", is_zero),
        ("reduce_bucket_size", is_bucketed),
        ("overlap_comm", is_bucketed),
    ):
        value = getattr(cfg.engine, key)
        require(
            has_effect or value == getattr(EngineConfig(), key),
            f"engine.{key}={str(value).lower()} has no effect with {cfg.engine.name}, parallel.zero_stage={stage} "
            f"and train.precision={precision}; leave it out, or use engine=deepspeed with parallel.zero_stage=2",
        )
    require(
        not (cfg.engine.overlap_comm and stage == 1 and plan.accumulation_steps > 1),
        "engine.overlap_comm=true with ZeRO 1 and several micro-batches loses gradients in DeepSpeed; leave "
        "engine.overlap_comm out, or set parallel.zero_stage=2",
    )


def _largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of ``number`` that is not above ``at_most``."""
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)
