"""The cache of compiled kernels: what others planted or a crash damaged is never executed, and is built anew.

Most tests build a library of empty functions, so that the compiler takes no time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import multiprocessing
import os
import shlex
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moepp.ops.cpu import build, cache
from moepp.ops.cpu.cache import Cache, CacheError, find_cache
from moepp.ops.cpu.compiler import BuildError, Compiler, find_compiler
from moepp.ops.signatures import SIGNATURES

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(CC is None, reason="no C compiler")

FORK = multiprocessing.get_context("fork")
ANSWERS = "long has_amx(void) { return 0; }\nlong has_avx2_experts(void) { return 1; }\n"
FUNCTIONS = ANSWERS + "".join(f"void {name}(void) {{}}\n" for name in build.FUNCTIONS)
# Leaves a mark when it is loaded, before anything of it is called.
PLANTED = 'int mkdir(const char *, int);\n__attribute__((constructor)) void run(void) {{ mkdir("{}", 0700); }}\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small library's one C file, and an empty cache folder for it."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "moe.c").write_text(FUNCTIONS)
    for name, value in (("_FOLDER", folder), ("_SOURCES", ("moe.c",)), ("_HEADERS", ())):
        monkeypatch.setattr(build, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(cache.tempfile, "tempdir", None)  # where TMPDIR is remembered
    monkeypatch.delenv("MOEPP_CPU", raising=False)
    build._warn_once.cache_clear()
    return folder


@pytest.fixture
def fresh_library() -> Iterator[None]:
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.fixture
def folder(sources: Path) -> Path:
    """The cache folder, holding a good library."""
    return build_now().path.parent


def build_now(bits: int = 32) -> build.Library:
    return build._find_or_build(bits, ((),))


def fake_compiler(path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A compiler that is the real one after ``body``, a shell script; returns the file that counts its runs."""
    runs = path.with_suffix(".runs")
    runs.touch()
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then cat "{path}.version" 2>/dev/null; exit 0; fi\n'
        f'echo run >> "{runs}"\n{body}\nexec {CC} "$@"\n'
    )
    path.chmod(0o700)
    monkeypatch.setenv("CC", shlex.quote(str(path)))
    return runs


def compile_planted(source: str, target: Path) -> bytes:
    code = target.with_suffix(".c")
    code.write_text(source)
    subprocess.run([str(CC), "-shared", "-fPIC", str(code), "-o", str(target)], check=True)
    return target.read_bytes()


def in_child(work: Callable[[], object]) -> int | None:
    """Exit code of a forked process that does it: negative after a signal."""
    process = FORK.Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


# ---- damage ----


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _zero_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(4096) + content[8192:])


def _replace_by(kind: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        path.unlink()
        kind(path)

    return damage


def _replace_by_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "a few bytes": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "cut to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "last byte missing": lambda path: os.truncate(path, path.stat().st_size - 1),
    "without seal": lambda path: os.truncate(path, path.stat().st_size - 32),
    "zeroed pages": _zero_pages,
    "a bit in the middle": lambda path: _flip(path, path.stat().st_size // 2),
    "a bit of the seal": lambda path: _flip(path, path.stat().st_size - 1),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "of the other type": lambda path: shutil.copyfile(build_now(16).path, path),
    "a folder": _replace_by(lambda path: (path.mkdir(), (path / "x").touch())),
    "a pipe": _replace_by(os.mkfifo),
    "a link": _replace_by_link,
    "open to the group": lambda path: path.chmod(0o660),
    "open to everybody": lambda path: path.chmod(0o606),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_unsafe_file_is_built_anew_with_a_warning(folder, damage, caplog):
    path = build_now().path
    damage(path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="moepp"):
        assert build_now().has_avx2_experts
    assert [path.name in record.getMessage() for record in caplog.records] == [True]
    found = path.lstat()
    assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    caplog.clear()
    assert build_now().has_avx2_experts and not caplog.records, "the new one is good"


@pytest.mark.parametrize("content", [b"", b"no library", FUNCTIONS.encode()], ids=["empty", "short", "text"])
def test_what_is_no_library_is_built_anew_even_under_a_right_seal(folder, content):
    path, key = build_now().path, build._key(32, ((),), find_compiler())
    Cache(folder).write(path.name, key, content)
    assert build_now().has_avx2_experts


def test_a_library_without_a_function_is_built_anew_even_under_a_right_seal(folder, tmp_path):
    content = compile_planted(ANSWERS, tmp_path / "planted.so")
    path, key = build_now().path, build._key(32, ((),), find_compiler())
    Cache(folder).write(path.name, key, content)
    assert build_now().handle.swiglu


def test_a_compiler_that_makes_no_loadable_library_is_tried_twice_and_reported(sources, tmp_path, monkeypatch):
    (sources / "moe.c").write_text(ANSWERS)
    runs = fake_compiler(tmp_path / "cc.sh", monkeypatch, "")
    with pytest.raises(BuildError, match=r"cannot be loaded: .*undefined symbol: \w+$"):
        build_now()
    assert runs.read_text().count("run") == 2
    assert not list((tmp_path / "cache" / "moepp").glob("kernels-*"))


def test_a_file_that_is_cut_while_it_is_in_use_does_no_harm(folder):
    def use() -> None:
        library = build_now()
        os.truncate(library.path, 0)
        for name in build.FUNCTIONS:
            getattr(library.handle, name)(*([0] * len(SIGNATURES[name].split())))

    assert in_child(use) == 0


# ---- what others planted ----


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o775, 0o1777, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(folder, tmp_path, mode, caplog):
    folder.chmod(mode)
    with caplog.at_level(logging.WARNING, logger="moepp"):
        path = build_now().path
    assert path.parent == tmp_path / "other" / f"moepp-{os.geteuid()}"
    (record,) = caplog.records
    assert f"{folder} can be written by others (mode {mode:o}" in record.getMessage()


def test_a_link_in_the_folders_place_is_not_followed(folder, tmp_path):
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert find_cache().folder.parent == tmp_path / "other"
    assert f"{folder} is a link" in find_cache().remarks


def test_a_folder_that_everybody_can_replace_is_not_used(folder, tmp_path):
    (tmp_path / "cache").chmod(0o777)
    assert find_cache().folder.parent == tmp_path / "other" and "everybody can replace it" in find_cache().remarks[0]
    (tmp_path / "cache").chmod(0o1777)  # as /tmp
    assert find_cache().folder == folder


def test_folders_and_files_of_another_user_are_not_used(folder, monkeypatch):
    path, key = build_now().path, build._key(32, ((),), find_compiler())
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CacheError, match=f"{folder} belongs to user {os.getuid()}.*XDG_CACHE_HOME"):
        (folder.parent.parent / "other" / f"moepp-{os.getuid() + 1}").mkdir()
        find_cache()
    with pytest.raises(CacheError, match="the file belongs to user"):
        cache._read_sealed(path, key)


@pytest.mark.parametrize("way", ["in place", "link", "open to others", "under the seal of another name"])
def test_a_planted_library_is_never_executed(folder, tmp_path, way):
    mark, path, key = tmp_path / "executed", build_now().path, build._key(32, ((),), find_compiler())
    content = compile_planted(FUNCTIONS + PLANTED.format(mark), tmp_path / "planted.so")
    planted = tmp_path / "planted" / path.name
    if way == "in place":
        path.write_bytes(content)
    elif way == "link":
        planted.parent.mkdir()
        Cache(planted.parent).write(path.name, key, content)
        path.unlink()
        path.symlink_to(planted)
    elif way == "open to others":
        Cache(folder).write(path.name, key, content)
        path.chmod(0o666)
    else:
        Cache(folder).write(path.name, build._key(16, ((),), find_compiler()), content)
    build_now()
    assert not mark.exists()
    ctypes.CDLL(str(tmp_path / "planted.so"))
    assert mark.exists(), "the check can see it"


def test_a_link_swapped_for_the_file_all_the_time_is_never_followed(folder, tmp_path):
    mark, path, key = tmp_path / "executed", build_now().path, build._key(32, ((),), find_compiler())
    content = compile_planted(FUNCTIONS + PLANTED.format(mark), tmp_path / "planted.so")
    Cache(tmp_path).write("sealed.so", key, content)
    good = path.read_bytes()

    def swap() -> None:
        while True:
            with contextlib.suppress(OSError):
                (tmp_path / "link").symlink_to(tmp_path / "sealed.so")
                os.replace(tmp_path / "link", path)
                (tmp_path / "file").write_bytes(good)
                (tmp_path / "file").chmod(0o600)
                os.replace(tmp_path / "file", path)

    swapper = FORK.Process(target=swap)
    swapper.start()
    try:
        reads, deadline = [], time.monotonic() + 120
        while not (len(reads) > 100 and good[:-32] in reads and None in reads):
            assert time.monotonic() < deadline
            reads.append(Cache(folder).read(path.name, key))
    finally:
        swapper.kill()
        swapper.join()
    assert content not in reads


# ---- builds ----


def test_the_key_knows_the_compilers_version_and_options_the_sources_and_the_type(sources, tmp_path, monkeypatch):
    def key(bits: int = 32, options: tuple[str, ...] = ()) -> bytes:
        return build._key(bits, (options,), find_compiler())

    fake_compiler(tmp_path / "cc.sh", monkeypatch, "")
    keys = [key(), key(16), key(options=("-O1",))]
    Path(f"{tmp_path / 'cc.sh'}.version").write_text("cc 99.1")
    keys.append(key())
    (sources / "moe.c").write_text(FUNCTIONS + "int more;")
    keys.append(key())
    assert len(set(keys)) == 5 and key() == keys[-1]


@pytest.mark.parametrize("kind", ["amx", "avx512_bf16", "avx512", "avx2"])
def test_every_cpu_kind_has_options_of_its_own_and_never_more_instructions(kind):
    attempts = build._attempts(kind)
    if kind != "amx":
        assert not any("native" in option for options in attempts for option in options)
        assert all(any(option.startswith("-march=") for option in options) for options in attempts)
    assert kind == "amx" or attempts not in [build._attempts(other) for other in (None, "amx")]


FULL = 'echo "In file included from moe.c:6:" >&2; echo "vector.h:9: fatal error: No space left on device" >&2; exit 1'


def test_a_full_disk_is_named_with_the_remedy_after_one_attempt(sources, tmp_path, monkeypatch):
    runs = fake_compiler(tmp_path / "cc.sh", monkeypatch, FULL)
    with pytest.raises(BuildError, match=r"vector.h:9: .*No space left on device; free space in .*cache/moepp"):
        build._find_or_build(32, build._attempts(None))
    assert runs.read_text().count("run") == 1


def test_a_disk_that_is_full_already_is_named_without_an_attempt(sources, tmp_path, monkeypatch, caplog, fresh_library):
    runs = fake_compiler(tmp_path / "cc.sh", monkeypatch, "")
    monkeypatch.setattr(Cache, "free_bytes", lambda _: 12_345)
    with caplog.at_level(logging.WARNING, logger="moepp"):
        assert build.library(torch.float32) is None and build.library(torch.bfloat16) is None
    (record,) = caplog.records
    assert "No space left on device in" in record.getMessage() and "12,345 bytes; free some" in record.getMessage()
    assert not runs.read_text()


def test_the_line_with_the_error_is_shown_and_other_options_are_tried(sources, tmp_path, monkeypatch):
    complaint = 'echo "In file included from moe.c:6:" >&2; echo "moe.c:7: warning: x" >&2; echo "cc: error: odd" >&2'
    runs = fake_compiler(tmp_path / "cc.sh", monkeypatch, f'case "$*" in *native*) {complaint}; exit 1;; esac')
    assert build._find_or_build(32, (("-march=native",), ())).path.exists()
    assert runs.read_text().count("run") == 2
    with pytest.raises(BuildError, match=r"cc\.sh: cc: error: odd$"):
        build._find_or_build(32, (("-march=native", "-O1"), ("-march=native",)))


def test_a_cache_that_fills_up_after_the_build_costs_the_file_alone(sources, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise build.WriteError(28, "x", "No space left on device", "free some")

    monkeypatch.setattr(cache, "write_whole", refuse)
    with caplog.at_level(logging.WARNING, logger="moepp"):
        assert build_now().has_avx2_experts
    assert "cannot be kept: cannot write x: No space left on device; free some" in caplog.text


def test_a_killed_build_takes_its_compiler_along_and_the_next_one_clears_up(sources, tmp_path, monkeypatch):
    pids_file = tmp_path / "pids"
    body = f'echo $$ > "{pids_file}"; sleep 300 & echo $! >> "{pids_file}"; wait'
    fake_compiler(tmp_path / "cc.sh", monkeypatch, body)
    process = FORK.Process(target=build_now)
    process.start()
    wait_until(lambda: pids_file.exists() and pids_file.read_text().count("\n") == 2)
    pids = list(map(int, pids_file.read_text().split()))
    folder = tmp_path / "cache" / "moepp"
    assert len(list(folder.glob("build-*"))) == 1 and all(map(is_alive, pids))
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    wait_until(lambda: not any(map(is_alive, pids)))
    (folder / "build-elsewhere-1234").mkdir()  # of another host: perhaps in use
    (folder / "build-elsewhere-5678").mkdir()
    os.utime(folder / "build-elsewhere-5678", (0, 0))
    monkeypatch.delenv("CC")
    build_now()
    assert [path.name for path in folder.glob("build-*")] == ["build-elsewhere-1234"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_of_several_processes_one_builds_and_the_others_wait(sources, tmp_path, monkeypatch):
    runs = fake_compiler(tmp_path / "cc.sh", monkeypatch, "sleep 0.5")
    processes = [FORK.Process(target=build_now) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4 and runs.read_text().count("run") == 1
    assert sorted(path.name[:8] for path in (tmp_path / "cache" / "moepp").iterdir()) == ["kernels-", "lock"]


def test_without_locks_every_process_builds_for_itself(sources, tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "cache" / "moepp").mkdir(parents=True, mode=0o700)
    (tmp_path / "cache" / "moepp" / f"build-{cache.socket.gethostname()}-x").mkdir()  # perhaps in use
    assert build_now().has_avx2_experts
    assert len(list((tmp_path / "cache" / "moepp").glob("build-*"))) == 1


# ---- places ----


def test_a_place_that_cannot_be_made_is_named_and_the_next_one_taken(sources, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with caplog.at_level(logging.WARNING, logger="moepp"):
        assert build_now().path.parent.parent == tmp_path / "other"
        build_now()
    (record,) = caplog.records
    assert "because /proc/nowhere/moepp cannot be made (No such file or directory)" in record.getMessage()


def test_without_any_place_torch_takes_over_with_one_line(sources, tmp_path, monkeypatch, caplog, fresh_library):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    (tmp_path / "other" / f"moepp-{os.geteuid()}").write_text("a file")
    with caplog.at_level(logging.WARNING, logger="moepp"):
        assert build.library(torch.float32) is None and build.library(torch.bfloat16) is None
    (record,) = caplog.records
    assert "is not a folder" in record.getMessage() and "set XDG_CACHE_HOME" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_folder_that_goes_away_meanwhile_costs_the_kernels_alone(sources, folder, monkeypatch, caplog, fresh_library):
    shutil.rmtree(folder)
    monkeypatch.setattr(build, "find_cache", lambda: Cache(folder))
    with caplog.at_level(logging.WARNING, logger="moepp"):
        assert build.library(torch.float32) is None
    (record,) = caplog.records
    assert "its folder does not exist" in record.getMessage() and "torch operations" in record.getMessage()


def test_without_a_compiler_one_line_says_so_for_both_types(sources, tmp_path, monkeypatch, caplog, fresh_library):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING, logger="moepp"):
        assert build.library(torch.float32) is None and build.library(torch.bfloat16) is None
    (record,) = caplog.records
    assert "no C compiler found; install gcc or clang" in record.getMessage()


@pytest.mark.parametrize(("cc", "reason"), [("/no/such/cc", "No such file"), ("false", "exit code 1"), ("/", "denied")])
def test_a_compiler_that_does_not_run_is_named(monkeypatch, cc, reason):
    monkeypatch.setenv("CC", cc)
    with pytest.raises(BuildError, match=f"the C compiler {cc} does not run: .*{reason}"):
        find_compiler()


def test_only_the_first_process_of_a_machine_prints_a_warning(monkeypatch, caplog):
    places = [("LOCAL_RANK", "1", "INFO"), ("LOCAL_RANK", "0", "WARNING"), ("SLURM_LOCALID", "1", "INFO")]
    for name, rank, level in places:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setenv(name, rank)
        build._warn_once.cache_clear()
        with caplog.at_level(logging.INFO, logger="moepp"):
            build._warn_once("odd")
        assert caplog.records[-1].levelname == level


def test_a_compiler_may_have_words_behind_it(monkeypatch):
    monkeypatch.setenv("CC", f"env {CC}")
    assert find_compiler() == Compiler(("env", str(CC)), find_compiler().version)
