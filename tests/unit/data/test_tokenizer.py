"""A tokenizer file: what is switched off, what goes into an export, which token ends a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moepp.cli.export import _write_tokenizer
from moepp.cli.main import main
from moepp.data.indexed import open_indexed
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.data.tokenizer import Tokenizer
from moepp.data.vocabulary import padded_size
from moepp.errors import DataError
from tests.data_files import write_word_tokenizer

TEXTS = ["the people of the government said", "hello world again, and again and again"]
ENCODED = ["the government", "hello", "  two  spaces ", "</s> spelled <s> in a text", "", "日本語\n x"]


def library_tokenizer(prefix_space: bool = False) -> Any:
    """Byte-level BPE with <s> = 0 and </s> = 1."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library: Any = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 300, "special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet}
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(**options, show_progress=False))
    return library


def post_processors() -> dict[str, Any]:
    from tokenizers import processors

    begin, end = ("<s>", 0), ("</s>", 1)
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A <s> $B:1", special_tokens=[begin, end])
    trimming = processors.ByteLevel(trim_offsets=False)
    return {
        "none": None,
        "template": template,
        "bert": processors.BertProcessing(end, begin),
        "roberta": processors.RobertaProcessing(end, begin, trim_offsets=True, add_prefix_space=False),
        "byte level": trimming,
        "sequence": processors.Sequence([trimming, template]),
        "sequence of bert": processors.Sequence([processors.BertProcessing(end, begin)]),
        "sequence in a sequence": processors.Sequence([processors.Sequence([template]), trimming]),
    }


@pytest.mark.parametrize("prefix_space", [False, True], ids=["", "space before"])
@pytest.mark.parametrize("name", list(post_processors()))
def test_exports_encode_as_training_did(tmp_path: Path, name: str, prefix_space: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer as Library

    library = library_tokenizer(prefix_space)
    if (processor := post_processors()[name]) is not None:
        library.post_processor = processor
    library.save(str(tmp_path / "tokenizer.json"))
    adds = len(library.encode("hello").ids) != len(library.encode("hello", add_special_tokens=False).ids)
    assert adds == (name not in ("none", "byte level")), "the case is none"

    tokenizer = Tokenizer(str(tmp_path / "tokenizer.json"), eod_id=1)
    (tmp_path / "out").mkdir()
    _write_tokenizer(tmp_path / "out", tokenizer, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = Library.from_file(str(tmp_path / "out" / "tokenizer.json"))
    library.encode_special_tokens = plain.encode_special_tokens = True
    for text in ENCODED:
        saw = library.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == saw.ids == theirs(text).input_ids == theirs.encode(text)
        exported = plain.encode(text, add_special_tokens=True)
        assert (exported.ids, exported.offsets, exported.type_ids) == (saw.ids, saw.offsets, saw.type_ids)
    assert theirs(ENCODED[:2]).input_ids == [tokenizer.encode(text) for text in ENCODED[:2]]
    assert (theirs.eos_token_id, theirs.bos_token_id) == (1, 1)
    if "sequence" in name and "bert" not in name:
        kinds = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"]["processors"]
        assert {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True} in kinds


def test_a_word_that_ends_documents_stays_a_word_in_texts(tmp_path: Path) -> None:
    """transformers makes a special token of whatever it is told is the end token."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = write_word_tokenizer(tmp_path / "tokenizer.json", 20, eod=None)
    tokenizer = Tokenizer(path, "w1")
    (tmp_path / "out").mkdir()
    _write_tokenizer(tmp_path / "out", tokenizer, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("w12 w1 w15").input_ids == tokenizer.encode("w12 w1 w15") == [12, 1, 15]
    assert theirs.eos_token_id == 1


@pytest.mark.parametrize(("special", "said"), [(True, False), (False, True)])
def test_ends_that_stand_in_texts_are_counted_and_said(tmp_path: Path, special: bool, said: bool) -> None:
    from tokenizers import AddedToken

    library = library_tokenizer()
    add = library.add_special_tokens if special else library.add_tokens
    add([AddedToken("[END]", special=special)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("one [END] two[END]\nthree\n[END] and [END]\nfour[END]\n")
    prefix, remarks = str(tmp_path / "text"), []
    read, path = ReadOptions(text_unit="line"), f"{tmp_path}/tokenizer.json"
    options = PrepareOptions(prefix, path, read=read, eod_token="[END]", max_lost_share=1.0, progress=False)
    manifest = prepare([f"{prefix}.txt"], options, remarks.append)
    assert manifest.sources[0]["documents_with_eod"] == (3 if said else 0)
    found = [remark for remark in remarks if "3 documents hold the end token '[END]' in their text" in remark]
    assert len(found) == said, remarks


def test_truncation_padding_and_dropout_in_the_file_change_nothing(tmp_path: Path) -> None:
    library = library_tokenizer()
    expected = library.encode(TEXTS[0]).ids
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.model.dropout = 0.9
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.json"), "</s>")
    assert [tokenizer.encode(TEXTS[0]) for _ in range(5)] == [expected] * 5
    (tmp_path / "text.txt").write_text(TEXTS[0])
    prefix = str(tmp_path / "text")
    options = PrepareOptions(prefix, tokenizer.path, eod_token="</s>", progress=False, max_lost_share=1.0)
    prepare([f"{prefix}.txt"], options)
    assert open_indexed(prefix).tokens_T().tolist() == [*expected, 1]
    exported = json.loads(tokenizer.to_plain_json())
    assert exported["truncation"] is exported["padding"] is exported["model"]["dropout"] is None


def test_the_normalizer_stays(tmp_path: Path) -> None:
    from tokenizers import normalizers

    library = library_tokenizer()
    library.normalizer = normalizers.Lowercase()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("HELLO") == tokenizer.encode("hello")
    assert json.loads(tokenizer.to_plain_json())["normalizer"] == {"type": "Lowercase"}


def test_the_id_of_the_data_counts_more_than_a_name(tmp_path: Path) -> None:
    path = write_word_tokenizer(tmp_path / "tokenizer.json", 20)
    assert Tokenizer(path).eod_token == "<|endoftext|>"
    tokenizer = Tokenizer(path, eod_id=4)
    assert (tokenizer.eod_token, tokenizer.eod_id) == ("w4", 4)
    for wrong in (22, -1):
        with pytest.raises(DataError, match=f"has no token {wrong}, with which the training data end"):
            Tokenizer(path, eod_id=wrong)


def test_ids_without_a_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_word_tokenizer(tmp_path / "t.json", 20))
    assert tokenizer.vocab_size == 22 and tokenizer.unused_ids(26) == [22, 23, 24, 25]
    assert tokenizer.decode([3, 22, 25, 4]) == "w3 w4"


@pytest.mark.parametrize(
    ("tokens", "allowed"), [(400, 512), (4096, 4096), (8000, 8064), (50_257, 51_200), (32_000, 32_768)]
)
def test_padding_of_a_vocabulary(tokens: int, allowed: int) -> None:
    assert padded_size(tokens) == allowed


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["prepare", "x.txt", "--output", "x", "--tokenizer", "gone.json"], "--tokenizer"),
        (["generate", "{folder}", "--prompt", "x", "--tokenizer", "gone.json"], "--tokenizer"),
    ],
    ids=["prepare", "generate"],
)
def test_messages_name_the_option_of_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    option: str,
) -> None:
    from tests.official_cases import released_config, released_tensors, write_released

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a text")
    config = released_config(num_experts=[8])
    folder = write_released(tmp_path / "released", config, released_tensors(config))
    assert main([argument.format(folder=folder) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert f"check {option}," in message and "data.tokenizer" not in message
