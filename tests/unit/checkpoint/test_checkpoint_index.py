"""A checkpoint's index and archives are data: nothing in them is called, and nothing outside the index changes."""

from __future__ import annotations

import enum
import importlib
import io
import itertools
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moepp.checkpoint import index as index_module
from moepp.checkpoint import inert_pickle
from moepp.checkpoint.archive import read_tensor
from moepp.checkpoint.index import StoredTensor
from moepp.checkpoint.storage import TensorReader, write_tensors
from moepp.errors import CheckpointError
from tests.unit.checkpoint.test_checkpoint_format import Evil, replace_index

WEIGHT = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "w/fp32": WEIGHT,
    "w/step": torch.ones(1),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    **{
        f"as-{dtype}".replace("torch.", ""): torch.arange(5).to(dtype)
        for dtype in (
            *(torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8),
            torch.bool,
        )
    },
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save(dict(TENSORS), storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.fixture
def checkpoint(template: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000010"
    folder.mkdir()
    for file in template.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def read_all(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint)
    tensors = {key: torch.zeros(shape, dtype=TENSORS[key].dtype) for key, shape in reader.shapes.items()}
    reader.fill(tensors)
    return tensors


def assert_right(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == TENSORS.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[key]), key


def live_objects() -> list[Any]:
    """What the names in an index stand for in this process."""
    found = []
    for name in sorted(index_module._NAMES - {"builtins.getattr", "pathlib._local.PosixPath"}):
        module, _, attribute = name.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute))
    return [*found, pathlib.PurePath, pathlib.Path, torch.serialization, Metadata, torch]


@contextmanager
def nothing_changes() -> Iterator[None]:
    before = [dict(vars(thing)) for thing in live_objects() if hasattr(thing, "__dict__")]
    yield
    assert before == [dict(vars(thing)) for thing in live_objects() if hasattr(thing, "__dict__")]


def refused(checkpoint: Path, index: bytes | None = None, match: str | None = None) -> None:
    """Reading ends in one line, and in nothing else."""
    if index is not None:
        (checkpoint / ".metadata").write_bytes(index)
    with nothing_changes(), pytest.raises(CheckpointError, match=match) as caught:
        read_all(checkpoint)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900 and message.endswith("; use another checkpoint")


# --- what is read


def test_everything_that_dcp_writes_is_read(checkpoint: Path) -> None:
    assert_right(read_all(checkpoint))


def test_dcp_reads_what_is_written_here(tmp_path: Path) -> None:
    write_tensors(tmp_path, dict(TENSORS), None)
    assert_right(read_all(tmp_path))
    theirs = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    load(theirs, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert_right(theirs)


class PicklerOfOtherPythons(pickle.Pickler):
    """Members of enumerations as Python 3.11.2 pickles them (Debian 12's), whatever this Python does."""

    member: tuple[Any, str] | None = None

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, self.member or (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("python", ["this", "3.11.2", "3.13"])
def test_indices_of_other_pythons_and_protocols_are_read(checkpoint: Path, protocol: int, python: str) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    stream = io.BytesIO()
    (PicklerOfOtherPythons if python == "3.11.2" else pickle.Pickler)(stream, protocol, fix_imports=False).dump(index)
    data = stream.getvalue()
    assert (b"getattr" in data) == (python == "3.11.2")
    if python == "3.13" and protocol == 2:
        data = data.replace(b"cpathlib\n", b"cpathlib._local\n")
    (checkpoint / ".metadata").write_bytes(data)
    assert_right(read_all(checkpoint))


# --- instructions


def name_(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text_(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def attributes_(**values: bytes) -> bytes:
    """The state (None, {name: value}), which makes an unpickler set attributes of whatever it is."""
    return b"N}(" + b"".join(text_(key) + value for key, value in values.items()) + b"u\x86"


def test_index_that_would_redirect_every_file_is_refused(checkpoint: Path) -> None:
    """Allowed names alone: PosixPath.__fspath__ becomes _get_layout, whose cache becomes a map of paths."""
    layout, posix = name_("torch.serialization._get_layout"), name_("pathlib.PosixPath")
    cache = b"}(" + posix + text_("out/README.md") + b"\x85R" + text_("elsewhere") + b"u"
    attack = layout + attributes_(cache=cache) + b"b0" + posix + attributes_(__fspath__=layout) + b"b0"
    whole = (checkpoint / ".metadata").read_bytes()
    refused(checkpoint, b"\x80\x04" + attack + whole[2:], "setting the state of")
    refused(checkpoint, b"\x80\x04" + attack.replace(b"b0", b"b") + b".", "setting the state of")


@pytest.mark.parametrize("dotted", sorted(index_module._NAMES))
@pytest.mark.parametrize("state", [attributes_(x=b"K\x01"), b"}" + text_("x") + b"K\x01s", b"N", b")"])
def test_no_name_takes_a_state(checkpoint: Path, dotted: str, state: bytes) -> None:
    refused(checkpoint, b"\x80\x02" + name_(dotted) + state + b"b.", "setting the state of")


@pytest.mark.parametrize("target", [b"K\x01", b")", b"]", b"}", b"N", b"\x88", text_("x"), b")\x85"])
def test_nothing_but_a_recorded_object_takes_a_state(checkpoint: Path, target: bytes) -> None:
    refused(checkpoint, b"\x80\x02" + target + b"}b.", "setting the state of")


def test_an_object_takes_one_state(checkpoint: Path) -> None:
    whole = (checkpoint / ".metadata").read_bytes()
    refused(checkpoint, whole[:-1] + b"}b.", "setting the state of")


@pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
def test_every_instruction_is_read_as_data_or_refused(checkpoint: Path, opcode: Any) -> None:
    whole = (checkpoint / ".metadata").read_bytes()
    for argument in (b"", b"\0" * 8, b"\xff" * 8, b"1\n", b"'a'\n", b"os\nsystem\n", b"\x01\0\0\0\0\0\0\0a"):
        instruction = opcode.code.encode("latin-1") + argument
        for stack in (b"", b"(", b"K\x01K\x02", b")" + name_("torch.Size"), name_("torch.Size") + b")", b"}]"):
            for index in (b"\x80\x04" + stack + instruction + b".", whole[:11] + stack + instruction + whole[11:]):
                if opcode.name == "FRAME" and not stack and argument == b"\0" * 8 and len(index) > 100:
                    (checkpoint / ".metadata").write_bytes(index)
                    assert_right(read_all(checkpoint))  # a frame of no bytes
                else:
                    refused(checkpoint, index)


SUPPORTED = {opcode.name for opcode in pickletools.opcodes if opcode.code.encode("latin-1") in inert_pickle._ACTIONS}


def test_instructions_that_nothing_needs_are_unknown() -> None:
    assert not SUPPORTED & {
        *("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "LONG4", "FROZENSET", "BYTEARRAY8"),
        *("NEXT_BUFFER", "READONLY_BUFFER", "INT", "LONG", "FLOAT", "STRING", "UNICODE", "DUP", "POP", "POP_MARK"),
    }


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (name_("torch.Size") + b"(K\x01t\x81K\x01\x85\x81.", "a call of"),  # what was made is called
        (text_("os.system") + b")R.", "a call of"),
        (name_("torch.Size") + b"]R.", "a call of"),
        (name_("torch.Size") + b"(K\x01K\x02u.", "adding items to 'torch.Size'"),
        (name_("torch.Size") + b"(K\x01e.", "adding items to 'torch.Size'"),
        (b"](K\x01K\x02u.", "adding items to list"),
        (b"}(K\x01e.", "adding items to Pairs"),
        (b"}(K\x01u.", "lacks its operands"),
        (text_("torch") + b"K\x01\x93.", "a name in it is not text"),
        (text_("torch") + text_("Size.__class__") + b"\x93.", "is not part of"),
        (
            text_("torch.distributed") + text_("checkpoint.metadata.Metadata") + b"\x93K\x01.",
            "is not part of|other than one",
        ),
        (text_("torch\n") + text_("Size") + b"\x93.", r"torch\\nSize|torch\\n.Size"),
        (b"K\x01Q.", "not a checkpoint index"),
        (b"h\x07.", "lacks its operands"),
        (b"K\x01K\x02.", "other than one value"),
        (b"(K\x01.", "other than one value"),
        (b".", "other than one value"),
        (b"K\x01.K\x01", "follow the end"),
        (b"K\x01", "the end at byte"),
        (b"K", "cut off"),
        (b"ctorch\nSize", "cut off"),
        (b"X\x01\0\0\0\xff.", "utf-8"),
        (b"X\x03\0\0\0\xed\xa0\x80.", "utf-8"),  # half a surrogate pair
    ],
)
def test_misused_instructions_are_refused(checkpoint: Path, body: bytes, match: str) -> None:
    refused(checkpoint, b"\x80\x04" + body, match)


def huge() -> Iterator[tuple[str, bytes]]:
    yield "memo number", b"K\x01r\xff\xff\xff\xff."
    yield "text longer than the file", b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc."
    yield "bytes longer than the file", b"\x8e" + struct.pack("<Q", 1 << 40) + b"abc."
    yield "byte array longer than the file", b"\x96" + struct.pack("<Q", 1 << 40) + b"abc."
    yield "frame longer than the file", b"\x95" + struct.pack("<Q", 1 << 62) + b"K\x01."
    yield "long integer", b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"."
    yield "digits", b"I" + b"9" * 10**6 + b"\n."
    yield "nested tuples", b")" + b"\x85" * 10**5 + b"."
    yield "nested lists", b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    yield "tuples that double", b"K\x01" + b"\x94h\x00\x86" + b"".join(b"q\x01h\x01\x86" for _ in range(100)) + b"."
    yield "marks", b"(" * 10**5 + b"."
    yield "list in itself", b"]\x94h\x00a."


@pytest.mark.parametrize(("kind", "body"), list(huge()), ids=[kind for kind, _ in huge()])
def test_index_that_would_take_memory_or_recurse_is_refused(checkpoint: Path, kind: str, body: bytes) -> None:
    refused(checkpoint, b"\x80\x04" + body)


def test_nested_values_in_a_field_are_not_followed(checkpoint: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    deep: Any = ()
    for _ in range(30):
        deep = (deep, deep)
    index.planner_data = deep  # 2^30 values, if anything went through them
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    assert_right(read_all(checkpoint))


def test_number_of_instructions_is_limited(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert_pickle, "MAX_INSTRUCTIONS", 500)
    refused(checkpoint, None, "more than 500 instructions")


# --- fields


def places(index: Any) -> dict[str, Any]:
    return {place.fqn: place for place in index.storage_data}


def with_place(index: Any, key: str, **changes: Any) -> None:
    place = places(index)[key]
    index.storage_data[place] = replace(index.storage_data[place], **changes)


def with_entry(index: Any, key: str, **changes: Any) -> None:
    index.state_dict_metadata[key] = replace(index.state_dict_metadata[key], **changes)


def sized(shape: tuple[int, ...]) -> dict[str, Any]:
    size = torch.Size(shape)
    return {"size": size, "chunks": [ChunkStorageMetadata(torch.Size([0] * len(shape)), size)]}


def half() -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 4]))]


def two_halves() -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size([n, 0]), torch.Size([1 + n, 4])) for n in range(2)]


def offset_chunk() -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([3, 4]))]


def with_properties(index: Any, **changes: Any) -> None:
    entry = index.state_dict_metadata["w/fp32"]
    index.state_dict_metadata["w/fp32"] = replace(entry, properties=replace(entry.properties, **changes))


def rename(index: Any, key: str) -> None:
    index.state_dict_metadata[key] = index.state_dict_metadata.pop("w/fp32")
    info = index.storage_data.pop(places(index)["w/fp32"])
    index.storage_data[MetadataIndex(key, torch.Size([0, 0]), 0)] = info


FIELDS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda i: with_place(i, "w/fp32", relative_path="../elsewhere"), "not a plain file"),
    (lambda i: with_place(i, "w/fp32", relative_path="/etc/hostname"), "not a plain file"),
    (lambda i: with_place(i, "w/fp32", relative_path="info.json"), "not a plain file"),
    (lambda i: with_place(i, "w/fp32", relative_path="__0_0.distcp\n"), "not a plain file"),
    (lambda i: with_place(i, "w/fp32", relative_path="__0_٣.distcp"), "not a plain file"),
    (lambda i: with_place(i, "w/fp32", relative_path=["__0_0.distcp"]), "not a plain file"),
    (lambda i: with_place(i, "w/fp32", relative_path="__7_0.distcp"), "No such file"),
    (lambda i: with_place(i, "w/fp32", offset=-1), "not an integer of 0 or more"),
    (lambda i: with_place(i, "w/fp32", offset=False), "not an integer of 0 or more"),
    (lambda i: with_place(i, "w/fp32", offset=1 << 62), "not an integer of 0 or more"),
    (lambda i: with_place(i, "w/fp32", offset=1 << 40), "lies outside"),
    (lambda i: with_place(i, "w/fp32", length=1 << 40), "lies outside"),
    (lambda i: with_place(i, "w/fp32", length=8), "does not fit its 8 bytes"),
    (lambda i: with_place(i, "w/fp32", offset=10), "inside another"),
    (lambda i: with_place(i, "w/fp32", transform_descriptors=["zstd"]), "stored transformed"),
    (lambda i: with_entry(i, "w/fp32", size=torch.Size([3, 5])), "not the whole tensor"),
    (lambda i: with_entry(i, "w/fp32", chunks=[]), "not stored in one piece"),
    (lambda i: with_entry(i, "w/fp32", chunks=half()), "not the whole tensor"),
    (lambda i: with_entry(i, "w/fp32", chunks=two_halves()), "not stored in one piece"),
    (lambda i: with_entry(i, "w/fp32", chunks=offset_chunk()), "not the whole tensor"),
    (lambda i: with_entry(i, "w/fp32", **sized((1 << 40, 1 << 40))), "does not fit"),
    (lambda i: with_entry(i, "w/fp32", **sized((0, 1 << 59))), "does not fit"),
    (lambda i: with_entry(i, "w/fp32", **sized((1,) * 17)), "a size of .* is damaged"),
    (lambda i: with_entry(i, "w/fp32", **sized((4, 3))), "dtype or shape is not what the index says"),
    (lambda i: with_entry(i, "w/fp32", size=(3, 4)), "a size of .* is damaged"),
    (lambda i: with_properties(i, dtype=torch.int32), "dtype or shape is not what the index says"),
    (lambda i: with_properties(i, dtype=torch.complex64), "torch.complex64 is not part of"),
    (lambda i: with_properties(i, dtype="torch.float32"), "no dtype"),
    (lambda i: with_properties(i, layout=torch.sparse_coo), "not a plain, contiguous tensor"),
    (lambda i: with_properties(i, memory_format=torch.channels_last), "not a plain, contiguous tensor"),
    (lambda i: with_properties(i, pin_memory=None), "damaged"),
    (lambda i: rename(i, "a\nb"), "not the name of a tensor"),
    (lambda i: rename(i, "\x1b[2J"), "not the name of a tensor"),
    (lambda i: rename(i, "\u202ex"), "not the name of a tensor"),
    (lambda i: rename(i, ""), "not the name of a tensor"),
    (lambda i: rename(i, "x" * 10**6), "not the name of a tensor"),
    (lambda i: i.state_dict_metadata.pop("w/fp32"), "stored but not described"),
    (lambda i: i.storage_data.pop(places(i)["w/fp32"]), "does not say where"),
    (lambda i: i.storage_data.update({MetadataIndex("w/fp32"): i.storage_data[places(i)["w/fp32"]]}), "twice"),
    (lambda i: i.storage_data.update({MetadataIndex("w/fp32", [1, 0]): _StorageInfo("__0_0.distcp", 0, 9)}), "piece"),
    (lambda i: i.state_dict_metadata.update({7: i.state_dict_metadata["w/fp32"]}), "not the name of a tensor"),
    (lambda i: setattr(i, "storage_data", None), "not a dictionary"),
    (lambda i: setattr(i, "state_dict_metadata", []), "not a dictionary"),
    (lambda i: setattr(i, "more", 1), "'more' is not part of"),
    (lambda i: delattr(i, "storage_data") or i.__dict__.pop("storage_data", None), "lacks storage_data"),
]


@pytest.mark.parametrize(("change", "match"), FIELDS, ids=range(len(FIELDS)))
def test_damaged_fields_are_refused(checkpoint: Path, change: Callable[[Any], Any], match: str) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    try:
        change(index)
    except AttributeError:
        index.__dict__.pop("storage_data")
    refused(checkpoint, pickle.dumps(index), match)


@pytest.mark.parametrize("member", [(torch.Size, "__class__"), (Metadata, "__init__"), (int, "x")])
def test_index_may_ask_for_no_attribute_but_a_memory_format(checkpoint: Path, member: tuple[Any, str]) -> None:
    stream = io.BytesIO()
    pickler = PicklerOfOtherPythons(stream)
    pickler.member = member
    pickler.dump(pickle.loads((checkpoint / ".metadata").read_bytes()))
    refused(checkpoint, stream.getvalue(), "is not part of a checkpoint index")


def test_a_key_twice_in_a_dictionary_is_refused(checkpoint: Path) -> None:
    whole = (checkpoint / ".metadata").read_bytes()
    entry = whole.index(b"\x8c\x06w/step")
    assert whole.count(b"\x8c\x06w/step") == 1
    refused(checkpoint, whole[:entry] + b"\x8c\x06w/fp32" + whole[entry + 8 :])


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", [*SPECIAL, "huge"])
def test_index_that_is_no_small_regular_file_is_refused(checkpoint: Path, kind: str) -> None:
    path = checkpoint / ".metadata"
    path.unlink()
    if kind in SPECIAL:
        SPECIAL[kind](path)
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    refused(checkpoint, None, "cannot read .*metadata")


@pytest.mark.parametrize("kind", [*SPECIAL, "missing", "truncated"])
def test_tensors_that_are_no_regular_file_are_refused(checkpoint: Path, kind: str) -> None:
    path = checkpoint / "__0_0.distcp"
    data = path.read_bytes()
    path.unlink()
    if kind in SPECIAL:
        SPECIAL[kind](path)
    elif kind == "truncated":
        path.write_bytes(data[:-1])
    refused(checkpoint)


# --- archives


def stored(thing: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream, **options)
    return stream.getvalue()


def rewritten(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive of WEIGHT with other records."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored(WEIGHT))) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return stream.getvalue()


def pickled(old: bytes, new: bytes) -> bytes:
    def change(name: str, data: bytes) -> bytes:
        assert name != "data.pkl" or old in data
        return data.replace(old, new) if name == "data.pkl" else data

    return rewritten(change)


def many_records() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(1500):
            archive.writestr(f"archive/{number}" + "x" * 50, b"")
    return stream.getvalue()


def other_number(name: str, data: bytes) -> bytes:
    return {"byteorder": b"big"}.get(name, data)


ARCHIVES: list[tuple[str, Callable[[], bytes], str]] = [
    ("compressed", lambda: rewritten(lambda name, data: data, zipfile.ZIP_DEFLATED), "compressed"),
    ("bomb", lambda: rewritten(lambda n, d: b"\0" * 10**7 if n == "data/0" else d, zipfile.ZIP_DEFLATED), "compressed"),
    ("shorter storage", lambda: rewritten(lambda n, d: d[:-4] if n == "data/0" else d), "outside its storage"),
    ("other byte order", lambda: rewritten(other_number), "order of bytes"),
    ("strides over the storage", lambda: pickled(b"K\x04K\x01\x86", b"K\x44K\x01\x86"), "outside its storage"),
    ("offset over the storage", lambda: pickled(b"QK\x00", b"QK\x01"), "outside its storage"),
    ("negative stride", lambda: pickled(b"K\x04K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"), "strides are damaged"),
    ("strides too few", lambda: pickled(b"K\x04K\x01\x86", b"K\x04\x85"), "strides are damaged"),
    ("storage that is claimed larger", lambda: pickled(b"K\x0ct", b"J\xff\xff\xff\x7ft"), "outside its storage"),
    (
        "call of something else",
        lambda: pickled(b"ctorch._utils\n_rebuild_tensor_v2", b"cos\nsystem"),
        "os.system is not",
    ),
    ("parameter", lambda: stored(torch.nn.Parameter(WEIGHT)), "is not part of a stored tensor"),
    ("sparse", lambda: stored(WEIGHT.to_sparse()), "not part of a stored tensor|one tensor"),
    ("meta", lambda: stored(WEIGHT.to("meta")), "no archive of|not part of"),
    ("complex", lambda: stored(torch.zeros(6, dtype=torch.complex64)), "is not part of a stored tensor"),
    ("other shape", lambda: stored(WEIGHT.reshape(4, 3)), "dtype or shape"),
    ("other dtype", lambda: stored(WEIGHT.int()), "dtype or shape"),
    ("list", lambda: stored([WEIGHT]), "does not hold a plain tensor"),
    ("two tensors", lambda: stored([WEIGHT, WEIGHT + 1]), "one tensor"),
    ("number", lambda: stored(3), "archive of one tensor"),
    ("old format", lambda: stored(WEIGHT, _use_new_zipfile_serialization=False), "no archive"),
    ("pickle that runs code", lambda: stored(Evil(Path("was-here"))), "archive of one tensor"),
    ("bare pickle", lambda: pickle.dumps(Evil(Path("was-here"))).ljust(100, b"."), "no archive"),
    ("nothing", lambda: b"\0" * 500, "no archive"),
]


@pytest.mark.parametrize(("kind", "make", "match"), ARCHIVES, ids=[kind for kind, _, _ in ARCHIVES])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_archives_of_anything_but_the_tensor_are_refused(
    checkpoint: Path, kind: str, make: Callable[[], bytes], match: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    archive = make()
    with_only(checkpoint, archive)
    refused(checkpoint, None, match)
    assert not (tmp_path / "was-here").exists()


def with_only(checkpoint: Path, archive: bytes) -> None:
    """Let the checkpoint hold w/fp32 alone, in ``archive``."""

    def change(index: Any) -> Any:
        index.state_dict_metadata = {"w/fp32": index.state_dict_metadata["w/fp32"]}
        index.storage_data = {places(index)["w/fp32"]: _StorageInfo("__0_0.distcp", 0, len(archive))}
        return index

    (checkpoint / "__0_0.distcp").write_bytes(archive)
    replace_index(checkpoint, change)


def test_views_inside_their_storage_are_read(checkpoint: Path) -> None:
    for archive in (stored(WEIGHT), stored(torch.cat((WEIGHT, WEIGHT))[3:]), stored(WEIGHT.t().contiguous().t())):
        with_only(checkpoint, archive)
        assert torch.equal(read_all(checkpoint)["w/fp32"], WEIGHT)
    with_only(checkpoint, stored(torch.ones(1).expand(3, 4)))
    assert torch.equal(read_all(checkpoint)["w/fp32"], torch.ones(3, 4))


def test_no_byte_of_an_archive_can_be_changed_to_harm() -> None:
    """Each byte set to other values: an error, or a tensor of the right shape."""
    whole = stored(WEIGHT)
    place = StoredTensor((3, 4), torch.float32, "__0_0.distcp", 0, len(whole))
    for position, value in itertools.product(range(len(whole)), (0x00, 0x7F, 0xFF)):
        archive = bytearray(whole)
        archive[position] = value
        try:
            assert read_tensor(io.BytesIO(archive), place).shape == WEIGHT.shape
        except ValueError as error:
            assert str(error)


def test_directory_of_an_archive_is_short() -> None:
    """A directory as long as the tensor would take many times the tensor's memory."""
    archive = many_records()
    place = StoredTensor((len(archive),), torch.uint8, "__0_0.distcp", 0, len(archive))
    with pytest.raises(ValueError, match="directory of its archive is too long"):
        read_tensor(io.BytesIO(archive), place)
