"""The harness's requests: against one forward pass per request, in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance

from moepp.data.tokenizer import Tokenizer
from moepp.distributed.groups import ParallelGroups
from moepp.errors import ConfigError, DataError
from moepp.evaluation import backend as backend_module
from moepp.evaluation import scoring
from moepp.evaluation.backend import HarnessModel, build_rows
from moepp.evaluation.scoring import cut_at_stop
from moepp.evaluation.sharing import SharedModel
from moepp.model.transformer import Transformer
from tests.evaluation_cases import one_process, slow_loglikelihood, tiny_config, tiny_model, write_byte_tokenizer

MAX_SEQ_LEN = 48


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    with one_process() as groups:
        yield groups


@pytest.fixture(scope="module")
def shared(groups: ParallelGroups, tmp_path_factory: pytest.TempPathFactory) -> SharedModel:
    tokenizer = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return SharedModel(tiny_model(tiny_config(MAX_SEQ_LEN)), tokenizer, groups, batch_size=3)


def ask(shared: SharedModel, kind: str, *arguments: tuple[Any, ...]) -> tuple[list[Any], HarnessModel]:
    """Send requests as the harness does; returns answers and the backend, whose counters tell what happened."""
    backend = HarnessModel(shared)
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # pyright: ignore[reportArgumentType]
    return shared.run(lambda: getattr(backend, kind)(requests)), backend


def expected_score(model: Transformer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Oracle with the harness's rule for long prompts: the last max_seq_len + 1 tokens count."""
    whole = (context + continuation)[-(MAX_SEQ_LEN + 1) :]
    return slow_loglikelihood(model, whole[: -len(continuation)], continuation)


def test_loglikelihoods_equal_one_forward_per_request(shared: SharedModel):
    pairs = [
        ("the sun is", " red"),
        ("a", " dog and a cat"),
        ("", "birds"),
        ("trailing space ", "moves"),
        ("Question: old or new?\nAnswer:", " A"),
        ("Question: old or new?\nAnswer:", " B"),
        ("x" * 100, " cut from the left"),
        ("rain", " " + "y" * 20),
        ("tie", " yes"),
    ]
    scores, backend = ask(shared, "loglikelihood", *pairs)
    encode, eod = shared.tokenizer.encode, shared.tokenizer.eod_id
    for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True):
        # The harness keeps trailing spaces with the continuation.
        spaces = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        context_ids = encode(context) if context else [eod]
        whole = encode(context + continuation) if context else [eod, *encode(continuation)]
        expected, expected_greedy = expected_score(shared.model, context_ids, whole[len(context_ids) :])
        assert score == pytest.approx(expected, abs=2e-5)
        assert greedy is expected_greedy
    assert (backend.num_requests, backend.num_truncated) == (len(pairs), 1)
    assert shared.model.training  # as it was


def test_greedy_flag_is_true_for_what_greedy_decoding_writes(shared: SharedModel):
    model, encode = shared.model, shared.tokenizer.encode
    ids = encode("the sea")
    model.eval()
    with torch.no_grad():
        following = int(model.logits(model(torch.tensor([ids])).hidden)[0, -1].argmax())
    model.train()
    rows, places, _ = build_rows([(ids, [following]), (ids, encode(" A"))], MAX_SEQ_LEN)
    scores = shared.run(lambda: shared.score(rows))
    assert [scores[row][k][1] for row, k in places] == [True, encode(" A") == [following]]


def test_answers_of_one_token_share_a_row():
    pairs = [([1, 2, 3], [7]), ([1, 2, 3], [8]), ([1, 2], [3, 9]), ([1, 2, 3], [8, 8])]
    rows, places, num_truncated = build_rows(pairs, 10)
    assert [row.input_ids.tolist() for row in rows] == [[1, 2, 3], [1, 2, 3, 8]]
    found = [rows[row].continuations[k].tolist() for row, k in places]
    assert found == [[7], [8], [3, 9], [8, 8]] and num_truncated == 0


def test_prompts_lose_their_beginning_and_are_counted():
    rows, _, num_truncated = build_rows([([1, 2, 3, 4], [5, 6]), ([1], [2])], 3)
    assert [row.input_ids.tolist() for row in rows] == [[3, 4, 5], [1]]
    assert rows[0].continuations[0].tolist() == [5, 6]
    assert num_truncated == 1


def test_continuation_without_tokens_is_refused():
    with pytest.raises(DataError, match="0 continuation tokens"):
        build_rows([([1], [])], 4)


def test_slabs_do_not_change_answers(shared: SharedModel, monkeypatch: pytest.MonkeyPatch):
    pairs = [(f"number {i}", " red" * (i % 4 + 1)) for i in range(11)]
    whole, _ = ask(shared, "loglikelihood", *pairs)
    monkeypatch.setattr(backend_module, "SLAB", 4)
    slabs, backend = ask(shared, "loglikelihood", *pairs)
    assert [score for score, _ in slabs] == pytest.approx([score for score, _ in whole], abs=1e-5)
    assert backend.num_requests == 11


def test_rolling_scores_each_token_once(shared: SharedModel):
    texts = ["sun", "a stone bird " * 9]
    totals, _ = ask(shared, "loglikelihood_rolling", *[(text,) for text in texts])
    eod = shared.tokenizer.eod_id
    short = shared.tokenizer.encode(texts[0])
    assert totals[0] == pytest.approx(slow_loglikelihood(shared.model, [eod], short)[0], abs=2e-5)
    ids = shared.tokenizer.encode(texts[1])
    assert len(ids) > 2 * MAX_SEQ_LEN
    expected = slow_loglikelihood(shared.model, [eod], ids[:MAX_SEQ_LEN])[0]
    for start in range(MAX_SEQ_LEN, len(ids), MAX_SEQ_LEN):
        stop = min(start + MAX_SEQ_LEN, len(ids))
        window = ids[stop - MAX_SEQ_LEN - 1 : stop]  # full context for the last window too
        expected += slow_loglikelihood(shared.model, window[: start - stop], window[start - stop :])[0]
    assert totals[1] == pytest.approx(expected, abs=1e-4)


def greedy_text(shared: SharedModel, prompt: str, number: int) -> str:
    """Greedy decoding among the tokenizer's tokens, without cache, batch or stop texts."""
    model, tokenizer = shared.model, shared.tokenizer
    ids = tokenizer.encode(prompt)[-(MAX_SEQ_LEN - number) :]
    new: list[int] = []
    model.eval()
    with torch.no_grad():
        while len(new) < number and tokenizer.eod_id not in new:
            logits_V = model.logits(model(torch.tensor([ids + new])).hidden)[0, -1]
            new.append(int(logits_V[: tokenizer.vocab_size].argmax()))
    model.train()
    return tokenizer.decode(new)


def test_generation_equals_greedy_decoding_up_to_the_stop_text(shared: SharedModel):
    prompts = ["Q: who?\nA:", "a rather longer prompt with more words", "w", "z" * 70]
    free = [greedy_text(shared, prompt, 12) for prompt in prompts]
    stop = free[0][4]  # written by at least one of them
    options = {"until": [stop], "max_gen_toks": 12, "do_sample": False}
    texts, backend = ask(shared, "generate_until", *[(prompt, options) for prompt in prompts])
    assert texts == [text.split(stop)[0] for text in free]
    assert backend.num_truncated == 2  # the second leaves no room for 12 tokens


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_document_is_no_part_of_the_text(
    groups: ParallelGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: bool
):
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer.json", special)
    end, (a, b, c) = tokenizer.eod_id, tokenizer.encode("abc")
    drawn = [torch.tensor(row)[:, None] for row in ([a, end, c], [b, end, end], [end, end, end], [a, a, a])]
    monkeypatch.setattr(scoring, "stream", lambda *_, **__: iter(drawn))
    shared = SharedModel(tiny_model(tiny_config(MAX_SEQ_LEN)), tokenizer, groups, batch_size=3)
    texts, _ = ask(shared, "generate_until", *[(prompt, {"until": ["."], "max_gen_toks": 9}) for prompt in "xyz"])
    assert texts == ["ab", "", "c"]


def test_generation_leaves_half_of_a_short_model_to_the_prompt(shared: SharedModel):
    texts, _ = ask(shared, "generate_until", ("bird", {"until": []}))  # the harness's default asks for 256 tokens
    assert texts == [greedy_text(shared, "bird", MAX_SEQ_LEN // 2)]


def test_sampled_continuations_can_be_repeated(shared: SharedModel):
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.7}
    one, _ = ask(shared, "generate_until", ("rain", options))
    again, _ = ask(shared, "generate_until", ("rain", options))
    assert one == again


def test_unknown_generation_option_is_refused(shared: SharedModel):
    with pytest.raises(ConfigError, match="num_beams"):
        ask(shared, "generate_until", ("a", {"until": [], "num_beams": 4}))


def test_earliest_stop_text_cuts():
    assert cut_at_stop("one. two, three", [",", ".", ""]) == ("one", True)
    assert cut_at_stop("one", ["."]) == ("one", False)


def test_hidden_positions_are_scored_in_slices(shared: SharedModel, monkeypatch: pytest.MonkeyPatch):
    pairs = [("sea", " " + "y" * 30), ("sea", " no")]
    whole, _ = ask(shared, "loglikelihood", *pairs)
    monkeypatch.setattr("moepp.evaluation.scoring.SLICE_TOKENS", 5)
    slices, _ = ask(shared, "loglikelihood", *pairs)
    assert slices == [(pytest.approx(score, abs=1e-6), greedy) for score, greedy in whole]


def test_tokenizer_of_the_cases_has_single_token_answers(tmp_path: Path):
    encode = write_byte_tokenizer(tmp_path / "t.json").encode
    assert all(len(encode(answer)) == 1 for answer in (" A", " D", " yes", " no"))


@pytest.fixture(scope="module")
def merging(groups: ParallelGroups, tmp_path_factory: pytest.TempPathFactory) -> SharedModel:
    """A tokenizer whose tokens span words' ends, and which drops characters that it does not know."""
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Library

    vocabulary = {token: i for i, token in enumerate(["g", "o", "v", "m", "t", " ", "go", "gov", "govm", "govmt"])}
    merges = [("g", "o"), ("go", "v"), ("gov", "m"), ("govm", "t")]
    library = Library(models.BPE(vocab=vocabulary, merges=merges))
    library.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    path = tmp_path_factory.mktemp("merging") / "tokenizer.json"
    library.save(str(path))
    return SharedModel(tiny_model(tiny_config(MAX_SEQ_LEN)), Tokenizer(str(path)), groups, batch_size=3)


def test_a_token_across_the_join_is_scored_apart(merging: SharedModel):
    """lm-evaluation-harness pull request 4055: the continuation is encoded alone where nothing is left of it."""
    encode, eod = merging.tokenizer.encode, merging.tokenizer.eod_id
    assert len(encode("gov")) == len(encode("govmt")) == 1
    pairs = {
        ("gov", "mt"): (encode("gov"), encode("mt")),  # one token for both
        ("go v", " m"): (encode("go v"), encode(" m")),  # no token across
        ("", "gov"): ([eod], encode("gov")),
        (" ", "gov"): ([eod], encode(" gov")),  # the space goes to the continuation
        ("xyz", "gov"): ([eod], encode("gov")),  # a context that the tokenizer drops
        ("xyz ", "gov"): ([eod], encode(" gov")),
    }
    scores, backend = ask(merging, "loglikelihood", *pairs)
    for (score, greedy), (context, continuation) in zip(scores, pairs.values(), strict=True):
        expected, expected_greedy = slow_loglikelihood(merging.model, context, continuation)
        assert score == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    assert backend.num_requests == len(pairs)


def test_continuations_without_tokens_do_not_end_the_evaluation(merging: SharedModel):
    """Nothing is certain; text that the tokenizer drops cannot be written."""
    pairs = [("gov", ""), ("", ""), ("gov ", ""), ("gov", "xyz"), ("", "xyz"), ("gov", "mt")]
    scores, _ = ask(merging, "loglikelihood", *pairs)
    assert scores[:3] == [(0.0, True)] * 3
    assert scores[3:5] == [(-math.inf, False)] * 2
    assert math.isfinite(scores[5][0])
    totals, _ = ask(merging, "loglikelihood_rolling", ("",), ("xyz",), ("gov",))
    assert totals[:2] == [0, 0] and totals[2] < 0


def test_stops_of_several_tokens_end_a_continuation(shared: SharedModel):
    free = greedy_text(shared, "bird", 12)
    stop = free[3:6]
    assert len(shared.tokenizer.encode(stop)) > 1
    texts, _ = ask(shared, "generate_until", ("bird", {"until": [stop], "max_gen_toks": 12, "do_sample": False}))
    assert texts == [free[: free.index(stop)]]
    texts, _ = ask(shared, "generate_until", ("", {"until": [], "max_gen_toks": 3, "do_sample": False}))
    assert len(texts) == 1
