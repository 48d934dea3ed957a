"""The reader of indexed files against Megatron's own, and against damaged files."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moepp.data.indexed import open_indexed, split_bounds
from moepp.data.prepare.inspect import describe, unigram_entropy
from moepp.errors import DataError
from tests.data_files import numbered_documents, write_indexed, write_word_tokenizer

DOCUMENTS = [[3, 1, 4], [1], [5, 9, 2, 6], [5, 3]]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_reader_agrees_with_megatron(tmp_path: Path, dtype: str) -> None:
    from moepp.data.megatron import IndexedDataset

    prefix = write_indexed(tmp_path / "a", DOCUMENTS, dtype)
    theirs, ours = IndexedDataset(prefix), open_indexed(prefix)
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert ours.documents == len(theirs.document_indices) - 1 == 4
    assert ours.dtype == theirs.index.dtype
    assert ours.tokens_T().tolist() == [token for document in DOCUMENTS for token in document]
    assert ours.num_tokens == 10
    assert ours.token_id_range() == (1, 9)


def test_split_bounds_are_megatrons() -> None:
    from moepp.data.megatron import GPTDatasetConfig, TokenizerIdentity

    rng = np.random.default_rng(0)
    for _ in range(60):
        split = ",".join(str(share) for share in [rng.integers(1, 100), *rng.integers(0, 20, size=2)])
        config = GPTDatasetConfig(
            random_seed=0,
            sequence_length=8,
            blend=(["x"], None),
            split=split,
            tokenizer=TokenizerIdentity(10, 0),  # pyright: ignore[reportArgumentType]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        n = int(rng.integers(1, 400))
        bounds = split_bounds(split, n)
        assert config.split_matrix is not None
        for ours, theirs in zip(bounds, config.split_matrix, strict=True):
            if theirs is None:
                assert ours[0] == ours[1]
            else:
                assert ours == (round(theirs[0] * float(n)), round(theirs[1] * float(n)))
        assert bounds[0][0] == 0 and bounds[-1][1] == n


def test_split_tokens_are_those_of_its_documents(tmp_path: Path) -> None:
    documents = numbered_documents([5, 1, 7, 3, 2, 9, 4, 6, 8, 10])
    file = open_indexed(write_indexed(tmp_path / "a", documents))
    assert file.split_tokens("60,30,10") == (27, 18, 10)
    valid = [token for document in documents[6:9] for token in document]
    assert file.tokens_of_split("60,30,10", "valid").tolist() == valid
    assert file.tokens_of_split("60,30,10", "test").tolist() == documents[9]


def test_unigram_entropy_by_hand(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "a", [[0, 0, 1, 2], [3, 3, 3, 3], [4, 5], [6, 6]])
    shares = [2 / 12, 1 / 12, 1 / 12, 4 / 12, 1 / 12, 1 / 12, 2 / 12]
    assert unigram_entropy(prefix) == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    assert unigram_entropy(prefix, "50,25,25", "train") == pytest.approx(1.2130075659799042, rel=1e-12)
    assert unigram_entropy(prefix, "50,25,25", "valid") == pytest.approx(math.log(2), rel=1e-12)
    with pytest.raises(DataError, match="no token in test"):
        unigram_entropy(prefix, "50,50,0", "test")


def test_fingerprint_follows_the_lengths(tmp_path: Path) -> None:
    def fingerprint(name: str, lengths: list[int]) -> str:
        return open_indexed(write_indexed(tmp_path / name, numbered_documents(lengths))).fingerprint()

    assert fingerprint("a", [2, 3, 4]) == fingerprint("b", [2, 3, 4])
    assert fingerprint("a", [2, 3, 4]) != fingerprint("b", [3, 2, 4])


def test_describe_shows_text_and_checks_the_vocabulary(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "a", DOCUMENTS)
    report = describe(prefix, write_word_tokenizer(tmp_path / "t.json"))
    assert (report["documents"], report["tokens"], report["first text"]) == (4, 10, "w3 w1 w4")
    with pytest.raises(DataError, match=r"token id 9 and .* has 7 tokens"):
        describe(prefix, write_word_tokenizer(tmp_path / "small.json", num_words=5))


def _truncate(suffix: str, size: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(path.read_bytes()[:size])

    return damage


def _patch(position: int, content: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.idx")
        data = bytearray(path.read_bytes())
        data[position : position + len(content)] = content
        path.write_bytes(bytes(data))

    return damage


def _longer_bin(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes() + b"\x01\x00")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: Path(f"{prefix}.idx").unlink(), r"a.bin exists and .*a.idx does not"),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), r"a.idx exists and .*a.bin does not"),
        (_truncate(".idx", 0), "has 0 bytes, fewer than its header of 34"),
        (_truncate(".idx", 20), "has 20 bytes, fewer than its header of 34"),
        (_truncate(".idx", 60), "is 60 bytes and its header asks for 122"),
        (_truncate(".bin", 18), "a.bin has 18 bytes and .*a.idx describes 20"),
        (_truncate(".bin", 0), "a.bin has 0 bytes and .*a.idx describes 20"),
        (_longer_bin, "a.bin has 22 bytes and .*a.idx describes 20"),
        (_patch(0, b"X"), "does not start with Megatron's MMIDIDX"),
        (_patch(9, b"\x02"), "MMIDIDX version 1"),
        (_patch(17, b"\x07"), "dtype code 7"),
        (_patch(34, struct.pack("<i", -3)), "is corrupt"),
        (_patch(34, struct.pack("<ii", 1, 3)), "is corrupt"),
        (_patch(34 + 16 + 8, struct.pack("<q", 4)), "is corrupt"),
        (_patch(34 + 48 + 32, struct.pack("<q", 3)), "documents end at 3 of 4 sequences"),
    ],
)
def test_damage_is_one_clear_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    prefix = tmp_path / "a"
    write_indexed(prefix, DOCUMENTS)
    open_indexed(str(prefix))
    damage(prefix)
    with pytest.raises(DataError, match=message) as caught:
        open_indexed(str(prefix))
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_indexed(tmp_path / "a", DOCUMENTS)

    def refuse(path: str, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.bin/\.idx: Permission denied"):
        open_indexed(prefix)
