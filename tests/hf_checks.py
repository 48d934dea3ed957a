"""What an exported folder must do in transformers; also a program, for versions that are not the installed one.

``python -m tests.hf_checks FOLDER...`` reads each ``FOLDER/expected.pt`` and raises on the first difference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Of logits up to 7: in float32 training and this code are each up to 3e-5 away from float64.
CLOSE = {"rtol": 1e-5, "atol": 6e-5}


@torch.no_grad()
def check_folder(folder: Path) -> None:
    """Compare with what training computed: see ``expected`` in tests/unit/interop/test_hf.py."""
    from transformers import AutoConfig, AutoModelForCausalLM

    want = torch.load(folder / "expected.pt", weights_only=True)
    ids, mask, prompt = want["ids"], want["mask"], want["prompt"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "MoeppForCausalLM" and model.dtype == torch.float32
    assert not list(model.buffers())
    torch.testing.assert_close(model(ids).logits, want["logits"], **CLOSE)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, want["padded_logits"], **CLOSE)
    torch.testing.assert_close(model(ids, position_ids=want["positions"]).logits, want["positioned_logits"], **CLOSE)
    torch.testing.assert_close(model(ids, labels=ids).loss, want["loss"], **CLOSE)
    check_cache(model, ids, want["logits"])
    check_generation(model, prompt, want["greedy"])
    check_saving(model, ids, folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in fresh.named_parameters():
        if parameter.numel() > 100:
            expected = 0.0 if "norm" in name else 1.0 if name.endswith("value") else config.initializer_range
            assert abs(parameter.std().item() - expected) < 0.25 * expected + 1e-6, name
    fresh.generation_config.suppress_tokens = [50, 51, 52, 53, 54, 55, 56, 57, 58]
    assert fresh.resize_token_embeddings(53, pad_to_multiple_of=4) is fresh.get_input_embeddings()
    assert fresh.config.vocab_size == 56 and fresh.generation_config.suppress_tokens == [53, 54, 55]


def check_cache(model, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """One token after the other, with a cache object and with tuples of tensors."""
    for name, past in (("past_key_values", None), ("cache", None), ("past_key_values", ())):
        for start in range(0, ids.shape[1], 4):
            out = model(ids[:, start : start + 4], use_cache=True, **{name: past})
            past = out.past_key_values
            torch.testing.assert_close(out.logits, logits[:, start : start + 4], **CLOSE)
    assert isinstance(past, tuple)


def check_generation(model, prompt: torch.Tensor, greedy: torch.Tensor) -> None:
    """Greedy with and without cache, left-padded in a batch, and beams."""
    new = greedy.shape[1] - prompt.shape[1]
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    whole = torch.ones_like(prompt)
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
    for use_cache in (True, False):
        assert torch.equal(model.generate(prompt, attention_mask=whole, use_cache=use_cache, **options), greedy)
    handle.remove()
    lengths = range(prompt.shape[1], greedy.shape[1])
    assert seen == [prompt.shape[1], *[1] * (new - 1), *lengths], "with the cache, one token at a time"
    padding = torch.zeros_like(prompt[:, :3])
    padded, mask = torch.cat((padding, prompt), dim=1), torch.cat((padding, whole), dim=1)
    # The second row loses two tokens more to padding: rows of different lengths in one batch.
    mask[1, :5] = 0
    batch = model.generate(padded, attention_mask=mask, **options)
    alone = model.generate(prompt[1:, 2:], attention_mask=whole[1:, 2:], **options)
    assert torch.equal(batch[0, 3:], greedy[0]) and torch.equal(batch[1, 5:], alone[0])
    beams = [model.generate(prompt, attention_mask=whole, num_beams=3, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*beams)
    drawn = model.generate(prompt, attention_mask=whole, max_new_tokens=4, do_sample=True, top_k=5, pad_token_id=0)
    assert drawn.shape[1] == prompt.shape[1] + 4


def check_saving(model, ids: torch.Tensor, folder: Path) -> None:
    """What transformers saves again loads from there, code included, with the same logits."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


if __name__ == "__main__":
    import transformers

    for checked in map(Path, sys.argv[1:]):
        check_folder(checked)
        print(f"{checked.name}:{transformers.__version__}")
