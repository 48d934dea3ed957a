"""Text that a tokenizer cannot represent is counted, shown and refused; tokenizers cannot hurt the process."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp.cli.main import main
from moepp.data.indexed import open_indexed
from moepp.data.manifest import Manifest
from moepp.data.prepare.inspect import verify
from moepp.data.prepare.losses import can_lose
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.data.prepare.train_tokenizer import train_tokenizer
from moepp.data.tokenizer import Tokenizer
from moepp.data.tokenizer_guard import require_bounded
from moepp.errors import DataError
from tests.data_files import write_word_tokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _tree(model: dict[str, Any], **extra: Any) -> dict[str, Any]:
    eod = {"id": max(model["vocab"].values()) + 1, "content": "</s>", "special": True} | FLAGS
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": [eod], "model": model} | extra


def _characters(letters: str, **model: Any) -> dict[str, Any]:
    """A BPE of single characters, without bytes to fall back to."""
    return {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []} | model


def _byte_level() -> dict[str, Any]:
    return json.loads(train_tokenizer(iter(["some text"]), 300))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Manifest]:
    """Prepare lines of text with a tokenizer given as a tree."""

    def run(tree: dict[str, Any], texts: list[str], **options: Any) -> Manifest:
        (tmp_path / "t.json").write_text(json.dumps(tree))
        (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
        given = {"read": ReadOptions(text_unit="line"), "progress": False, "overwrite": True} | options
        return prepare(
            [str(tmp_path / "a.txt")], PrepareOptions(str(tmp_path / "out"), str(tmp_path / "t.json"), **given)
        )

    return run


def test_characters_without_a_token_are_counted_and_shown(run: Callable[..., Manifest]) -> None:
    said: list[str] = []
    texts = ["the people", "日本語のテキスト", "naïve the", "\t"]
    tree = _tree(_characters("theoplnavi "))
    (source,) = _say(run, tree, texts, said).sources
    # Independently: nine Japanese characters less one (eight), and the ï.
    assert (source["lost_characters"], source["lost_documents"], source["documents"]) == (9, 1, 2)
    assert source["empty_documents"] == 1 and source["unknown_tokens"] == 0
    assert source["lost_characters"] == sum(c not in "theoplnavi" for text in texts for c in text if not c.isspace())
    assert any("cannot represent 9 of 25 characters (36.00%), for example" in line for line in said)
    assert any("left out 1 documents of which the tokenizer keeps nothing" in line for line in said)


def _say(run: Callable[..., Manifest], tree: dict[str, Any], texts: list[str], said: list[str]) -> Manifest:
    import moepp.data.prepare.pipeline as engine

    original = engine.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "prepare", lambda inputs, options: original(inputs, options, said.append))
        return run(tree, texts, max_lost_share=1.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_unknown_tokens_are_lost_text(run: Callable[..., Manifest], workers: int) -> None:
    tree = _tree(_characters("abc?", unk_token="?"))
    (source,) = run(tree, ["abcabc", "axyb"], max_lost_share=0.2, workers=workers).sources
    assert (source["unknown_tokens"], source["lost_characters"]) == (2, 2)
    with pytest.raises(DataError, match=r"cannot represent 2 of 10 characters \(20.00%; 2 unknown tokens\), for exam"):
        run(tree, ["abcabc", "axyb"], max_lost_share=0.19, workers=workers)


def test_more_than_one_percent_is_refused_and_nothing_is_written(run: Callable[..., Manifest], tmp_path: Path) -> None:
    tree = _tree(_characters("ab"))
    run(tree, ["ab" * 99 + "xy"])  # 2 of 200
    before = verify(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"more than --max-lost-share=0.01; take one that falls back to bytes"):
        run(tree, ["ab" * 99 + "xyz"])
    assert verify(str(tmp_path / "out")) == before
    with pytest.raises(DataError, match="--max-lost-share=2 is not between 0 and 1"):
        run(tree, ["ab"], max_lost_share=2)


def _with_fallback(complete: bool) -> dict[str, Any]:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256 if complete else 255)}
    return _tree(_characters("a", byte_fallback=True) | {"vocab": vocabulary | {"a": 256}})


def test_tokenizers_that_lose_nothing_are_known() -> None:
    lossless = _byte_level()
    assert not can_lose(json.dumps(lossless))
    assert not can_lose(json.dumps(_with_fallback(True)))
    assert can_lose(json.dumps(_with_fallback(False)))
    assert can_lose(json.dumps(_tree(_characters("abc"))))
    removing = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [removing, lossless["pre_tokenizer"]]}
    assert can_lose(json.dumps(lossless | {"pre_tokenizer": steps}))
    assert can_lose(json.dumps(lossless | {"normalizer": {"type": "StripAccents"}}))
    assert can_lose(
        json.dumps(lossless | {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": ""}})
    )
    incomplete = json.loads(json.dumps(lossless))
    del incomplete["model"]["vocab"]["Ā"]
    assert can_lose(json.dumps(incomplete))


def test_characters_that_a_step_removes_are_lost(run: Callable[..., Manifest]) -> None:
    removing = {"type": "Split", "pattern": {"String": "-"}, "behavior": "Removed", "invert": False}
    tree = _byte_level()
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [removing, tree["pre_tokenizer"]]}
    (source,) = run(tree, ["a-b-c"], max_lost_share=0.5).sources
    assert source["lost_characters"] == 2


def test_text_cut_inside_a_character_is_lost(run: Callable[..., Manifest]) -> None:
    tree = _byte_level()
    tree["model"]["merges"] = []
    tree["model"]["vocab"] = {token: i for i, token in enumerate(["a", "b", "Ã", "x"])}  # Ã: first byte of é, not both
    tree["added_tokens"] = _tree(tree["model"])["added_tokens"]
    (source,) = run(tree, ["abéba"], max_lost_share=0.2).sources
    assert source["lost_characters"] == 1


def test_worker_processes_stay_light() -> None:
    probe = (
        "import sys, moepp.data.prepare.encode; print(*[name for name in ('torch', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Tokenizers that would hurt


def test_dropout_of_the_tokenizer_is_off(tmp_path: Path) -> None:
    tree = json.loads(train_tokenizer(iter(["hello hello world"] * 9), 270))
    plain = _load(tmp_path, tree).encode("hello world")
    tree["model"]["dropout"] = 0.9
    tokenizer = _load(tmp_path, tree)
    assert all(tokenizer.encode("hello world") == plain for _ in range(20))
    assert json.loads(tokenizer.to_json())["model"]["dropout"] is None


def _load(tmp_path: Path, tree: dict[str, Any] | str) -> Tokenizer:
    path = tmp_path / "t.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return Tokenizer(str(path))


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def _table(trie: bytes) -> dict[str, Any]:
    content = struct.pack("<I", len(trie)) + trie + b"a\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


HURTFUL = {
    "prepend": ({"type": "Prepend", "prepend": "x" * 10_000_000}, "longer by 10,000,000 characters"),
    "replace": (_replace({"String": "a"}, "a" * 65), "longer up to 65 times"),
    "chain": (_sequence(*[_replace({"String": "a"}, "aa")] * 40), "longer up to 1,099,511,627,776 times"),
    "nested": (_sequence(_sequence(*[_replace({"String": "a"}, "a" * 9)] * 2)), "longer up to 81 times"),
    "expression": (_replace({"Regex": ""}, "a" * 64), "longer up to 65 times"),
    "empty table": (_table(b""), "the tokenizers library fails on tokenizer"),
    "wrong table": (_table(b"AAAAAAAA"), "the tokenizers library fails on tokenizer"),
    "no table": ({"type": "Precompiled", "precompiled_charsmap": "!!!"}, "the tokenizers library fails on tokenizer"),
}


@pytest.mark.parametrize(("normalizer", "message"), HURTFUL.values(), ids=HURTFUL)
def test_hurtful_normalizers_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], normalizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        _load(tmp_path, _byte_level() | {"normalizer": normalizer})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def _decoders(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": list(steps)}


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (_replace({"String": "a"}, "a" * 2_000_000), "longer up to 2,000,000 times; mend its decoder"),
        (_replace({"String": "a" * 3000}, "a" * 3000), "longer by 3,000 characters; mend its decoder"),
        (_decoders(*[_replace({"String": "a"}, "aa")] * 7), "longer up to 128 times; mend its decoder"),
        (_decoders(_decoders(_replace({"Regex": ""}, "a" * 64))), "longer up to 65 times"),
        (_decoders(*[{"type": "BPEDecoder", "suffix": ""}] * 7), "longer up to 128 times"),
        ({"type": "WordPiece", "prefix": "#" * 2000, "cleanup": True}, "longer by 2,000 characters"),
        (
            {"type": "CTC", "pad_token": "p" * 2000, "word_delimiter_token": "|", "cleanup": True},
            "longer by 2,000 characters",
        ),
    ],
)
def test_hurtful_decoders_are_one_line(tmp_path: Path, decoder: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _load(tmp_path, _byte_level() | {"decoder": decoder})


@pytest.mark.parametrize("place", ["words", "scores", "added"])
def test_a_token_that_is_a_book_is_refused(tmp_path: Path, place: str) -> None:
    book = "x" * 10_001
    tree = json.loads(Path(write_word_tokenizer(tmp_path / "w.json")).read_text())
    if place == "words":
        tree["model"]["vocab"][book] = 22
    elif place == "scores":
        tree["model"] = {"type": "Unigram", "vocab": [["a", 0.0], [book, -1.0]], "unk_id": 0}
    else:
        tree["added_tokens"][0]["content"] = book
    with pytest.raises(DataError, match="has a token of 10,001 characters, more than 10,000"):
        _load(tmp_path, tree)


@pytest.mark.parametrize(
    "decoder",
    [
        _decoders(
            _replace({"String": "▁"}, " "),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    ],
)
def test_usual_decoders_are_let_pass(tmp_path: Path, decoder: dict[str, Any]) -> None:
    _load(tmp_path, _byte_level() | {"decoder": decoder})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not valid JSON: more than 100 values inside one another"),
        ("[]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ('{"model": 3}', "is not a tokenizer.json"),
        ('{"normalizer": {"type": "Sequence", "normalizers": 3}}', "is not a tokenizer.json"),
        ('{"normalizer": {"type": "Replace", "pattern": 3}}', "is not a tokenizer.json"),
    ],
)
def test_other_json_is_no_tokenizer(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        _load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_tokens_are_bounded_by_characters() -> None:
    require_bounded(72 * 37 + 4000, "x" * 37, "t.json")
    with pytest.raises(DataError, match=r"t\.json makes 10,000,037 tokens out of 37 characters"):
        require_bounded(10_000_037, "x" * 37, "t.json")


def test_usual_normalizers_are_let_pass(tmp_path: Path) -> None:
    steps = _sequence(
        {"type": "Prepend", "prepend": "▁"},
        _replace({"String": " "}, "▁"),
        _replace({"Regex": " {2,}"}, " "),
        *[_replace({"String": "``"}, '"')] * 9,
        {"type": "NFKC"},
    )
    assert _load(tmp_path, _with_fallback(True) | {"normalizer": steps}).encode("a")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_expression_that_backtracks_without_end_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str
) -> None:
    splitter = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tree = _byte_level()
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [splitter, tree["pre_tokenizer"]]}
    (tmp_path / "t.json").write_text(json.dumps(tree))
    (tmp_path / "a.txt").write_text("x" * 40)
    given = [str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "t.json"), "--output", str(tmp_path / "out")]
    start = time.monotonic()
    assert main(["prepare", *given, "--workers", workers, "--no-progress"]) == 2
    assert time.monotonic() - start < 60
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "the tokenizers library fails" in error and "retry-limit" in error


def test_a_missing_unknown_token_is_one_line(run: Callable[..., Manifest]) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    with pytest.raises(DataError, match=r"cannot encode the text .*Missing"):
        run(_tree(model, pre_tokenizer={"type": "WhitespaceSplit"}), ["a b"])


# Order


def _documents(prefix: Path | str) -> list[tuple[int, ...]]:
    file = open_indexed(str(prefix))
    return [tuple(part.tolist()) for part in np.split(file.tokens_T(), np.cumsum(file.lengths_Q)[:-1])]


def test_shuffling_depends_on_the_seed_alone(tmp_path: Path) -> None:
    tokenizer = write_word_tokenizer(tmp_path / "t.json", 100)
    for i in range(2):
        lines = [" ".join(f"w{50 * i + j}" for _ in range(j % 5 + 1)) for j in range(50)]
        (tmp_path / f"{i}.txt").write_text("\n".join(lines))

    def order(*inputs: int, **options: Any) -> tuple[list[tuple[int, ...]], list[str]]:
        said: list[str] = []
        given = {"read": ReadOptions(text_unit="line"), "progress": False, "overwrite": True} | options
        if given.get("append"):
            given["overwrite"] = False
        prepare(
            [str(tmp_path / f"{i}.txt") for i in inputs],
            PrepareOptions(str(tmp_path / "o"), tokenizer, **given),
            said.append,
        )
        assert verify(str(tmp_path / "o")).documents == len(_documents(tmp_path / "o"))
        return _documents(tmp_path / "o"), said

    plain, said = order(0, 1)
    assert (
        len(said) == 1 and "all 3 documents of valid are of one input" in said[0] and "1.txt; give --shuffle" in said[0]
    )
    shuffled, said = order(0, 1, shuffle=7)
    assert said == []
    assert shuffled != plain and sorted(shuffled) == sorted(plain)
    assert order(0, 1, shuffle=7, workers=2)[0] == shuffled
    assert order(0, 1, shuffle=8)[0] not in (plain, shuffled)
    assert sum(document[0] >= 50 for document in shuffled[:50]) in range(12, 38)
    first = order(0, shuffle=1)[0]
    both, said = order(1, shuffle=1, append=True)
    assert both[:50] == first and sorted(both) == sorted(plain) and both[50:] != plain[50:]
    assert "1.txt" in said[0]
    with pytest.raises(DataError, match="--shuffle=-1 is below 0"):
        order(0, shuffle=-1)


def test_one_input_or_short_splits_are_no_reason_to_warn(tmp_path: Path) -> None:
    tokenizer = write_word_tokenizer(tmp_path / "t.json")
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"w{i % 20}")
    (tmp_path / "lines.txt").write_text("w1\n" * 200)
    said: list[str] = []
    options = PrepareOptions(str(tmp_path / "o"), tokenizer, progress=False)
    prepare([str(tmp_path / "??.txt")], options, said.append)
    line = PrepareOptions(str(tmp_path / "p"), tokenizer, read=ReadOptions(text_unit="line"), progress=False)
    prepare([str(tmp_path / "lines.txt")], line, said.append)
    assert said == []
