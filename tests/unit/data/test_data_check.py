"""Data that cannot be trained on is refused before training, in one line that names it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp.data import check_data
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.errors import DataError
from tests.data_files import make_config, numbered_documents, write_indexed, write_word_tokenizer

LENGTHS = [9] * 20  # 16 documents of training, 3 of validation, 1 of test under 80,15,5


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_indexed(tmp_path / "data" / "a", numbered_documents(LENGTHS))


def _prepared(folder: Path, name: str, num_words: int = 20, eod_token: str | None = None) -> tuple[str, str]:
    path = write_word_tokenizer(folder / f"{name}.tokenizer.json", num_words)
    (folder / f"{name}.txt").write_text("\n".join(" ".join(f"w{i}" for i in range(12)) for _ in range(20)))
    output = str(folder / name)
    options = PrepareOptions(
        output, path, read=ReadOptions(text_unit="line"), eod_token=eod_token, progress=False, max_lost_share=1.0
    )
    prepare([str(folder / f"{name}.txt")], options)
    return output, path


def test_sound_data_passes(prefix: str, tmp_path: Path) -> None:
    check_data(make_config([prefix], model__vocab_size=180))
    output, tokenizer = _prepared(tmp_path, "b")
    check_data(make_config([output], model__vocab_size=22, data__tokenizer=tokenizer))


def test_paths_are_relative_to_the_current_folder(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_data(make_config(["data/a"]))
    with pytest.raises(DataError, match="moepp prepare --demo"):
        check_data(make_config(["data/b"]))


def _refusal(config_changes: dict[str, Any], paths: list[str]) -> str:
    with pytest.raises(DataError) as caught:
        check_data(make_config(paths, **config_changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data__seq_len": 144}, ["144 training tokens", "data.seq_len + 1 = 145"]),
        ({"data__seq_len": 27}, ["27 validation tokens", "20 documents", "train.eval_batches=0"]),
        ({"data__split": "99,0,1"}, ["0 validation tokens", "raise the second share"]),
        ({"model__vocab_size": 179}, ["token ids up to 179", "model.vocab_size is 179", "at least 180"]),
        ({"data__tokenizer": "nowhere.json"}, ["tokenizer nowhere.json does not exist"]),
    ],
)
def test_settings_that_the_data_cannot_serve(prefix: str, changes: dict[str, Any], parts: list[str]) -> None:
    message = _refusal(changes, [prefix])
    assert all(part in message for part in parts), message


def test_documents_without_a_known_end_cannot_keep_attention_to_themselves(prefix: str, tmp_path: Path) -> None:
    output, _ = _prepared(tmp_path, "b")
    corpora = check_data(make_config([output], model__vocab_size=22, data__document_attention=True))
    assert corpora.vocabulary.eod_id is not None
    for paths in ([prefix], [output, prefix]):
        message = _refusal({"data__document_attention": True}, paths)
        assert f"{prefix}.json" in message and "`moepp prepare`" in message


def test_no_validation_tokens_are_needed_without_evaluation(prefix: str) -> None:
    check_data(make_config([prefix], data__split="99,0,1", train__eval_batches=0))


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    assert "moepp prepare" in _refusal({}, [str(tmp_path / "none")])


def test_prefix_given_with_its_ending(prefix: str) -> None:
    assert f"give the prefix without its ending, {prefix}" in _refusal({}, [f"{prefix}.bin"])


def test_every_path_is_checked(prefix: str, tmp_path: Path) -> None:
    short = write_indexed(tmp_path / "short", numbered_documents([1] * 5))
    assert f"{short} has 4 training tokens" in _refusal({}, [prefix, short])


def test_unreadable_folder(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.isfile", lambda path: False)  # what an unreadable folder looks like
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "is not readable" in _refusal({}, [prefix])


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_empty_corpus(tmp_path: Path, documents: list[list[int]]) -> None:
    prefix = write_indexed(tmp_path / "empty", documents)
    assert "is an empty corpus" in _refusal({}, [prefix])


def test_negative_token_id(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "a", [[1, 2, -5, *range(9)]] * 20, "int32")
    assert "negative token id -5" in _refusal({}, [prefix])


def _no_json(path: Path) -> None:
    path.write_text("{not json")


def _other_json(path: Path) -> None:
    path.write_text('{"model": 3}')


def _large(path: Path) -> None:
    write_word_tokenizer(path, num_words=500)


@pytest.mark.parametrize(
    ("write", "part"),
    [
        (_no_json, "is not valid JSON"),
        (_other_json, "is not a tokenizer.json of the tokenizers library"),
        (_large, "has 502 tokens and model.vocab_size is 400"),
    ],
)
def test_unusable_tokenizer(prefix: str, tmp_path: Path, write: Callable[[Path], None], part: str) -> None:
    write(tmp_path / "tokenizer.json")
    message = _refusal({"data__tokenizer": str(tmp_path / "tokenizer.json"), "model__vocab_size": 400}, [prefix])
    assert part in message, message


def test_vocabulary_of_the_manifest_counts(tmp_path: Path) -> None:
    output, _ = _prepared(tmp_path, "b", num_words=40)  # ids up to 41; the text uses 0..11 and the last
    assert "token ids up to 41 and model.vocab_size is 41" in _refusal({"model__vocab_size": 41}, [output])
    output, _ = _prepared(tmp_path, "c", num_words=40, eod_token="w0")  # the text uses 0..11 only
    assert "a vocabulary of 42 tokens" in _refusal({"model__vocab_size": 41}, [output])


def test_tokenizer_must_be_the_one_of_the_data(tmp_path: Path) -> None:
    first, _ = _prepared(tmp_path, "b")
    second, other = _prepared(tmp_path, "c", num_words=30)
    assert "is not the one that" in _refusal({"data__tokenizer": other}, [first])
    assert "prepared with different tokenizers" in _refusal({}, [first, second])


def test_manifest_of_other_files(tmp_path: Path) -> None:
    output, _ = _prepared(tmp_path, "b")
    write_indexed(Path(output), numbered_documents(LENGTHS))
    assert "do not belong together" in _refusal({}, [output])
    Path(f"{output}.json").write_text("[]")
    assert "is not a manifest" in _refusal({}, [output])


def test_cache_folder_that_cannot_be_made(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = _refusal({"data__cache_dir": str(tmp_path / "file" / "cache")}, [prefix])
    assert "data.cache_dir=" in message and "cannot be created" in message


def test_checking_does_not_import_megatron(prefix: str) -> None:
    code = (
        "import sys; from moepp.data import check_data; from tests.data_files import make_config;"
        f"check_data(make_config([{prefix!r}])); print('megatron' in sys.modules, 'tokenizers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_validation_sets_are_checked_like_training_data(prefix: str, tmp_path: Path) -> None:
    def refused(path: str, **changes: Any) -> str:
        return _refusal({"data__validation": {"wiki": [path]}} | changes, [prefix])

    short = write_indexed(tmp_path / "short", [[1, 2, 3]])
    assert refused("none").startswith("data.validation.wiki entry none names no data")
    folder = str(Path(prefix).parent)
    assert f"it is a folder: name the prefix in it, {folder}/" in refused(folder)
    assert f"{short} (data.validation.wiki) has 3 tokens, fewer than one sequence" in refused(short)
    large = write_indexed(tmp_path / "large", [[500] * 40])
    assert f"{large} has token ids up to 500" in refused(large, model__vocab_size=180)
    assert "nowhere" in refused(str(tmp_path / "nowhere"))
    ours, _ = _prepared(tmp_path, "ours")
    theirs, _ = _prepared(tmp_path, "theirs", num_words=19)
    message = _refusal({"data__validation": {"wiki": [theirs]}, "model__vocab_size": 22}, [ours])
    assert message.startswith(f"data.paths and data.validation {ours} and {theirs} were prepared with different")


def test_with_sets_of_its_own_data_need_no_validation_part(prefix: str, tmp_path: Path) -> None:
    other = write_indexed(tmp_path / "other", [[1] * 40])
    changes = {"model__vocab_size": 180, "train__eval_batches": 2, "data__split": "1,0,0"}
    assert "0 validation tokens" in _refusal(changes, [prefix])
    corpora = check_data(make_config([prefix], **changes, data__validation={"wiki": [other]}))
    assert [file.prefix for file in corpora.validation["wiki"]] == [other]
    assert corpora.identity.keys() == {prefix}  # a run may be evaluated on other data later
