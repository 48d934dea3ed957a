"""Exported models under Hugging Face's Trainer: what a small Llama does there, with the numbers of one plain batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from tests.unit.interop.test_hf import CONFIGS, export, own_module_cache  # noqa: F401

KINDS = ("llama", "moepp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, own_module_cache: None) -> Path:  # noqa: F811
    path = tmp_path_factory.mktemp("export") / "mlp_interval"
    export(path, CONFIGS["mlp_interval"])
    return path


def new_model(kind: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if kind == "moepp":
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3, pad_token_id=0))


def sequences() -> list[dict[str, Tensor]]:
    """Eight of different lengths, right-padded, with different numbers of labels."""
    generator, made = torch.Generator().manual_seed(1), []
    for row in range(8):
        length = 12 - row % 4
        ids_S = F.pad(torch.randint(1, 61, (length,), generator=generator), (0, 12 - length))
        labels_S = torch.where(ids_S > 0, ids_S, -100)
        labels_S[: row % 3] = -100
        made.append({"input_ids": ids_S, "attention_mask": (ids_S > 0).long(), "labels": labels_S})
    return made


def trainer(model: Any, place: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    extra = {key: options.pop(key) for key in ("compute_loss_func", "compute_metrics") if key in options}
    chosen = {"output_dir": str(place), "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9, "logging_steps": 1}
    chosen |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 1} | options
    arguments = TrainingArguments(**chosen)
    return Trainer(model=model, args=arguments, train_dataset=sequences(), eval_dataset=sequences(), **extra)


def first_step(model: Any, place: Path, **options: Any) -> tuple[float, float]:
    """Loss and norm of the gradient, as logged."""
    made = trainer(model, place, **options)
    made.train()
    record = next(record for record in made.state.log_history if "loss" in record)
    return float(record["loss"]), float(record["grad_norm"])


def plain_step(model: Any, smoothing: float = 0.0) -> tuple[float, float]:
    """The eight sequences in one batch, without Trainer and without the model's own loss."""
    batch = {key: torch.stack([row[key] for row in sequences()]) for key in ("input_ids", "attention_mask", "labels")}
    logits_BSV = model.train()(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels_T = batch["labels"][:, 1:].flatten()
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_T, label_smoothing=smoothing)
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    return loss.item(), torch.stack(norms).norm().item()


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits_TV = outputs["logits"][:, :-1].flatten(0, 1)
    return F.cross_entropy(logits_TV, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


WAYS = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "own loss": {"compute_loss_func": own_loss},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["moepp", pytest.param("llama", marks=pytest.mark.slow)])  # Llama: what Trainer does
def test_any_cut_of_eight_sequences_gives_one_step(folder, tmp_path, kind, way):
    want = plain_step(new_model(kind, folder), WAYS[way].get("label_smoothing_factor", 0.0))
    for rows, accumulated in ((8, 1), (2, 4), (1, 8)):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated} | WAYS[way]
        got = first_step(new_model(kind, folder), tmp_path / "out", **options)
        assert got == pytest.approx(want, rel=2e-5), (rows, accumulated)


def test_checkpointed_gradients_are_bitwise_those_without(folder):
    row = {key: value[None] for key, value in sequences()[0].items()}
    seen = []
    for reentrant in (None, True, False):
        model = new_model("moepp", folder).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        calls = []
        model.model.layers[1].self_attn.register_forward_hook(lambda *_args, calls=calls: calls.append(1))
        out = model(**row, use_cache=reentrant is not None)  # asked for, and left out with a warning
        out.loss.backward()
        assert len(calls) == (1 if reentrant is None else 2) and "cache" not in out
        seen.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for other in seen[1:] for pair in zip(seen[0], other, strict=True))
    with pytest.raises(ValueError, match="gradient checkpointing and past_key_values exclude each other"):
        model(**row, past_key_values=())


def test_every_parameter_gets_a_gradient(folder):
    """Data-parallel wrappers wait for all of them."""
    model = new_model("moepp", folder).train()
    row = {key: value[None, :3] for key, value in sequences()[0].items()}  # fewer tokens than experts
    model(**row).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_gathers_logits_alone(folder, tmp_path, kind):
    def metrics(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (8, 12, 61)
        return {"rows": float(len(prediction.label_ids))}

    made = trainer(new_model(kind, folder), tmp_path, compute_metrics=metrics, per_device_eval_batch_size=3)
    assert made.evaluate()["eval_rows"] == 8.0
    assert made.predict(sequences()).predictions.shape == (8, 12, 61)
    made.compute_metrics = None
    bare = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in sequences()]
    assert made.predict(bare).predictions.shape == (8, 12, 61)


def test_training_saves_and_resumes(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    options = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2}
    whole = trainer(new_model("moepp", folder), tmp_path / "out", **options, save_strategy="steps", save_steps=1)
    whole.train()
    want = whole.model.state_dict()
    whole.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in want.items())
    resumed = trainer(new_model("moepp", folder), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "out", "checkpoint-1"))
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in want.items())


def test_labels_that_are_missing_or_all_ignored_are_as_for_llama(folder, tmp_path):
    ignored = [row | {"labels": torch.full((12,), -100)} for row in sequences()]
    bare = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in sequences()]
    for kind in KINDS:
        made = trainer(new_model(kind, folder), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        made.train_dataset = ignored
        made.train()
        assert next(record["loss"] for record in made.state.log_history if "loss" in record) == 0.0
        made.train_dataset = bare
        with pytest.raises(ValueError, match="did not return a loss"):
            made.train()


def test_adapters_reach_every_linear_module(folder):
    """Also those of the router, which are computed in fp32."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(new_model("moepp", folder), config)
    row = {key: value[None] for key, value in sequences()[0].items()}
    model(**row).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and not parameter.grad.any()
    ]
    # The first MoE layer has no router logits before it.
    assert {name.split(".lora_")[0].split("layers.")[1] for name in without} == {"1.moe.router.gate_map"}
    assert any(".fc1.lora_A" in name for name, _parameter in model.named_parameters())
    before = model.eval()(**row).logits
    torch.testing.assert_close(model.merge_and_unload()(**row).logits, before, rtol=1e-4, atol=1e-4)
