"""Fine-tuning an export with transformers by the recipe of its model card: ends are learnt, added tokens generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from moepp.cli.export import _write_tokenizer
from moepp.cli.model_card import _fine_tuning
from moepp.evaluation.load import eod_of_folder, find_model
from moepp.interop import hf
from moepp.interop.token_ids import TokenIds
from moepp.model import Transformer
from tests.evaluation_cases import tiny_config, tiny_model, write_byte_tokenizer
from tests.unit.interop.test_hf import own_module_cache  # noqa: F401

ROWS = 272  # of the model; its tokenizer has 266 tokens, the last of them the end of a text
ADDED = "<|im_end|>"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, own_module_cache: None) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    end, unused = tokenizer.eod_id, tuple(tokenizer.unused_ids(ROWS))
    assert (end, unused) == (265, (266, 267, 268, 269, 270, 271))
    hf.save_pretrained(tiny_model(tiny_config(vocab_size=ROWS)), folder, TokenIds(end, end, None, unused))
    _write_tokenizer(folder, tokenizer, 256)
    return folder


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)


def written(model: Any, token_id: int) -> list[int]:
    """What generation writes if ``token_id`` is by far the likeliest at every step; two tokens at most."""
    prompt = torch.tensor([[5, 6, 7]])

    def push(_module: Any, _arguments: Any, logits_BSV: torch.Tensor) -> torch.Tensor:
        return logits_BSV + 1e4 * torch.eye(logits_BSV.shape[-1])[token_id]

    handle = model.lm_head.register_forward_hook(push)  # before transformers suppresses anything
    try:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, pad_token_id=0)
    finally:
        handle.remove()
    return out[0, 3:].tolist()


def test_an_added_token_is_generated_once_the_model_is_resized(exported: Path, tmp_path: Path) -> None:
    model, tokenizer = load(exported)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", ADDED]})
    end = tokenizer.convert_tokens_to_ids(ADDED)
    assert end == 267 and written(model, end)[0] != end, "the case is none"
    embeddings = model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert embeddings is model.get_input_embeddings() and embeddings.weight.shape[0] == len(tokenizer) == 268
    assert model.generation_config.suppress_tokens is None
    assert written(model, end) == [end, end]
    model.config.eos_token_id = model.generation_config.eos_token_id = [265, end]
    model.save_pretrained(tmp_path)
    tokenizer.eos_token = ADDED
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert written(again, end) == [end] and written(again, 265) == [265]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [265, end]
    # and `moepp import` reads what transformers has saved
    ours, ids = Transformer(find_model(str(tmp_path)).cfg).eval(), torch.tensor([[5, 265, 6, end, 7]])
    hf.load_into(ours, tmp_path)
    assert ours.cfg.vocab_size == 268 and eod_of_folder(tmp_path) == end
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids).hidden), again(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "suppressed"),
    [
        ({"new_num_tokens": 268}, None),
        ({"new_num_tokens": 268, "pad_to_multiple_of": 16}, [268, 269, 270, 271]),
        ({"new_num_tokens": ROWS}, None),
        ({"new_num_tokens": 300}, None),
        ({"pad_to_multiple_of": 16}, [266, 267, 268, 269, 270, 271]),
        ({}, [266, 267, 268, 269, 270, 271]),
    ],
    ids=str,
)
def test_only_ids_that_became_tokens_are_freed(exported: Path, sizes: dict, suppressed: list[int] | None) -> None:
    model, _ = load(exported)
    model.resize_token_embeddings(**sizes, mean_resizing=False)
    assert model.generation_config.suppress_tokens == suppressed
    model.generation_config.suppress_tokens = None
    assert model.resize_token_embeddings(280, mean_resizing=False).num_embeddings == 280


def test_the_recipe_of_the_model_card_teaches_the_end(exported: Path) -> None:
    found = find_model(str(exported))
    own = write_byte_tokenizer(exported.parent / "own.json")
    sections = "\n".join(_fine_tuning(found, "moepp", own))
    assert "6 ids from 266 on have no token" in sections and "frees those below the new size" in sections
    assert "suppress_tokens = None" in "\n".join(_fine_tuning(found, "official", own))
    assert _fine_tuning(found, "moepp", None) == []
    model, tokenizer = load(exported)
    text = "hello"
    assert tokenizer(text + tokenizer.eos_token).input_ids[-1] != 265 and tokenizer.pad_token_id == 265, "needs it"
    recipe = sections.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(exported))
    names: dict[str, Any] = {"AutoTokenizer": transformers.AutoTokenizer, "model": model}
    exec(recipe, names)
    tokenizer = names["tokenizer"]
    assert model.config.pad_token_id == tokenizer.pad_token_id == 266
    rows = [tokenizer(part + tokenizer.eos_token) for part in (text, text + " yes")]
    assert [row.input_ids for row in rows] == [[*own.encode(text), 265], [*own.encode(text + " yes"), 265]]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate([{"input_ids": row.input_ids, "attention_mask": row.attention_mask} for row in rows])
    assert (batch["labels"][:, -1] == 265).all() and (batch["labels"] == -100).sum() == 1
    assert torch.isfinite(model(**batch).loss)
    assert written(model, 265) == [265]
