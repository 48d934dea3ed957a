"""Files and folders appear whole or not at all, at no other place than named, and a failure says what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moepp.errors import WriteError
from moepp.io import files, owners
from moepp.io.write_errors import write_error

ROOT = Path(__file__).resolve().parents[3]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write_folder(path: Path, content: str) -> None:
    with files.new_folder(path) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(content)
        (folder / "b.txt").write_text(content)


def fail_with(monkeypatch, call: str, number: int, after: int = 0) -> None:
    """Let os.<call> fail with an error number from its (after + 1)-th call on."""
    real, calls = getattr(os, call), []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(files.os, call, broken)


def test_a_file_appears_with_its_content_and_nothing_else(tmp_path):
    files.write_whole(tmp_path / "a", "größe")
    files.write_whole(tmp_path / "b", b"\0" * 3_000_000)
    with files.new_file(tmp_path / "c", "w") as stream:
        stream.write("x\n")
        assert names(tmp_path)[0].startswith(".c.") and not (tmp_path / "c").exists()
    assert names(tmp_path) == ["a", "b", "c"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "größe" and (tmp_path / "c").read_text() == "x\n"
    assert (tmp_path / "b").stat().st_size == 3_000_000


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    files.write_whole(tmp_path / "a", "old")
    fail_with(monkeypatch, call, errno.ENOSPC)
    with pytest.raises(WriteError, match=r"^cannot write .*/a: the disk is full \(.* MB free at /.*\); free space"):
        files.write_whole(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_permissions_of_a_file_stay_when_it_is_written_again(tmp_path, mode):
    path = tmp_path / "a"
    path.touch()
    path.chmod(mode)
    files.write_whole(path, "1")
    assert path.stat().st_mode & 0o777 == mode and path.read_text() == "1"
    with files.new_file(path) as stream:
        hidden = next(entry for entry in tmp_path.iterdir() if entry != path)
        assert hidden.stat().st_mode & 0o777 == mode, "nobody else reads it while it is written"
        stream.write(b"2")
    assert path.stat().st_mode & 0o777 == mode and path.read_text() == "2"


def test_a_failed_stream_leaves_the_old_file_and_its_own_error(tmp_path):
    files.write_whole(tmp_path / "a", "old")
    with pytest.raises(KeyError), files.new_file(tmp_path / "a") as stream:
        stream.write(b"new")
        raise KeyError
    with pytest.raises(FileNotFoundError), files.new_file(tmp_path / "a"):
        (tmp_path / "missing").read_text()  # not an error of writing a
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_folder_replaces_an_earlier_one_whole(tmp_path):
    path = tmp_path / "above" / "export"
    write_folder(path, "1")
    (path / "older-only").touch()
    write_folder(path, "2")
    assert names(path) == ["b.txt", "part"] and (path / "part" / "a.txt").read_text() == "2"
    assert names(path.parent) == ["export"]
    assert path.stat().st_mode & 0o777 == 0o777 & ~files._umask()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_folder_leaves_the_earlier_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "export"
    write_folder(path, "1")
    with pytest.raises(KeyError), files.new_folder(path) as folder:
        (folder / "b.txt").write_text("2")
        raise KeyError
    fail_with(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(WriteError, match=r"export: the disk reports an error; check the disk"):
        write_folder(path, "2")
    monkeypatch.undo()
    assert names(path) == ["b.txt", "part"] and (path / "b.txt").read_text() == "1" and names(tmp_path) == ["export"]


def test_an_error_in_the_hidden_folder_names_the_final_one(tmp_path):
    with pytest.raises(WriteError) as error, files.new_folder(tmp_path / "export") as folder:
        files.write_whole(folder / "no" / "a", "x")
    assert str(error.value).startswith(f"cannot write {tmp_path}/export: its folder does not exist")


# Runs in a process of its own: one without threads may fork, and its children never wait for a lock that nobody holds.
KILLED_AT_EVERY_CALL = """
import os, shutil, signal, sys
from pathlib import Path
from moepp.io import files

CALLS = ("mkdir", "open", "rename", "replace", "fsync", "fchmod", "close")
path, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "two renames":
    files._exchange = lambda one, other: False


def write(text):
    if kind == "file":
        files.write_whole(path, text)
        return
    with files.new_folder(path) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


def names():
    return sorted(entry.name for entry in path.parent.iterdir())


def was_killed_at(number):
    child = os.fork()
    if child == 0:
        left = number

        def counted(real):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        shutil.rmtree = counted(shutil.rmtree)
        write("new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def put_back():
    try:
        with files.new_folder(path):
            raise KeyError
    except KeyError:
        pass


seen, at, was_killed = set(), 0, True
while was_killed:
    at += 1
    write("old")
    assert names() == [path.name], (at, names())
    was_killed = was_killed_at(at)
    if not path.exists():  # between two renames
        assert kind == "two renames"
        assert len([name for name in names() if name.endswith(".old")]) == 1, names()
        put_back()  # even a write that fails does that
    content = {path.read_text()} if kind == "file" else {file.read_text() for file in path.iterdir()}
    assert content in ({"old"}, {"new"}), (at, content)
    seen |= content
assert at > 4 and seen == {"old", "new"}, (at, seen)
print("survived", at - 1, "kills")
"""


@pytest.mark.parametrize("kind", ["file", "exchange", "two renames"])
def test_a_kill_at_any_call_leaves_old_or_new_and_the_next_write_cleans_up(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_CALL, str(tmp_path / "it"), kind],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_the_file_of_a_living_writer_is_not_cleaned_away(tmp_path):
    with files.new_file(tmp_path / "a") as first:
        first.write(b"first")
        files.write_whole(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first" and names(tmp_path) == ["a"]
    with files.new_folder(tmp_path / "b") as folder:
        (folder / "x").touch()
        write_folder(tmp_path / "b", "second")
    assert names(tmp_path / "b") == ["x"]


def test_leftovers_of_other_names_and_planted_links_stay(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".a.00000000.new").symlink_to(victim)
    (tmp_path / ".ab.00000000.new").touch()
    (tmp_path / ".a.00000001.new").touch()
    os.mkfifo(tmp_path / ".a.00000002.new")
    files.write_whole(tmp_path / "a", "x")
    assert names(tmp_path) == [".a.00000000.new", ".a.00000002.new", ".ab.00000000.new", "a", "victim"]
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("leads_to", ["file", "folder", "nothing"])
def test_a_planted_link_is_refused_and_its_aim_untouched(tmp_path, leads_to):
    aim, link = tmp_path / "aim", tmp_path / "link"
    if leads_to == "file":
        aim.write_text("mine")
    elif leads_to == "folder":
        aim.mkdir()
    link.symlink_to(aim)
    writes = (
        lambda: files.write_whole(link, "x"),
        lambda: files.new_file(link).__enter__(),
        lambda: files.new_folder(link).__enter__(),
        lambda: files.open_append(link),
        lambda: files.open_own(link, os.O_RDWR),
        lambda: files.make_own_folder(link),
        lambda: files.move(__file__, link, replace=True),
    )
    for write in writes:
        with pytest.raises(WriteError, match="a symbolic link lies there, which is not followed; remove it"):
            write()
    assert link.is_symlink() and Path(__file__).exists()
    if leads_to == "file":
        assert aim.read_text() == "mine"
    elif leads_to == "folder":
        assert names(aim) == []
    else:
        assert not aim.exists()


def test_folders_above_may_be_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_whole(tmp_path / "link" / "a", "x")
    write_folder(tmp_path / "link" / "b", "x")
    assert names(tmp_path / "real") == ["a", "b"]


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (files.open_append, lambda path: files.write_whole(path, "x"), files.make_own_folder):
        with pytest.raises(WriteError, match="remove it"):
            write(tmp_path / "pipe")
    with pytest.raises(WriteError, match=r"not a file|symbolic link"):
        files.write_whole("/dev/null", "x")


def test_appending_continues_a_file(tmp_path):
    for part in (b"a", b"b"):
        with files.open_append(tmp_path / "log") as stream:
            stream.write(part)
            assert fcntl.fcntl(stream, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            assert files.is_at(stream.fileno(), tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == b"ab"
    with files.open_append(tmp_path / "log") as stream:
        files.write_whole(tmp_path / "log", "replaced")
        assert not files.is_at(stream.fileno(), tmp_path / "log")
        (tmp_path / "log").unlink()
        assert not files.is_at(stream.fileno(), tmp_path / "log")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make files of another user")
def test_files_and_writable_folders_of_others_are_refused(tmp_path):
    (tmp_path / "log").touch()
    os.chown(tmp_path / "log", 12345, -1)
    with pytest.raises(WriteError, match="belongs to user 12345; write to a folder of your own"):
        files.open_append(tmp_path / "log")
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 12345, -1)
    folder.chmod(0o755)
    owners.require_safe_folder(folder)
    folder.chmod(0o775)
    with pytest.raises(WriteError, match="belongs to user 12345 and its group may write to it"):
        owners.require_safe_folder(folder)
    folder.chmod(0o1777)
    owners.require_safe_folder(folder)


def test_an_own_folder_that_others_may_write_to_is_warned_of_once(tmp_path, caplog):
    tmp_path.chmod(0o777)
    owners.require_safe_folder(tmp_path)
    owners.require_safe_folder(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"everybody may write to {tmp_path} and so replace what lies there; chmod go-w prevents that"
    ]


def test_a_name_in_use_is_not_moved_over(tmp_path):
    files.write_whole(tmp_path / "a", "a")
    files.write_whole(tmp_path / "b", "b")
    with pytest.raises(WriteError, match="something lies there already"):
        files.move(tmp_path / "a", tmp_path / "b")
    files.move(tmp_path / "a", tmp_path / "b", replace=True)
    assert names(tmp_path) == ["b"] and (tmp_path / "b").read_text() == "a"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space at /"),
        (errno.EDQUOT, "quota is used up; remove files of yours"),
        (errno.EACCES, "get permission to write in"),
        (errno.EROFS, "mounted read-only; choose another place"),
        (errno.ENAMETOOLONG, "choose a shorter one"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOTRECOVERABLE, "remove the cause"),
    ],
)
def test_each_cause_has_its_remedy_on_one_line(tmp_path, number, remedy):
    message = str(write_error(number, tmp_path / "a"))
    assert remedy in message and "\n" not in message and str(tmp_path / "a") in message
    assert ("permission" in message) == (number == errno.EACCES)


def test_real_causes_reach_the_message(tmp_path):
    with pytest.raises(WriteError, match="the name is too long"):
        files.write_whole(tmp_path / ("x" * 256), "")
    files.write_whole(tmp_path / ("ü" * 127), "longest")
    with pytest.raises(WriteError, match="its folder does not exist; make it"):
        files.write_whole(tmp_path / "no" / "a", "")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=f"{tmp_path}/file is not a folder; remove it"):
        files.make_folder(tmp_path / "file" / "a")
    with pytest.raises(WriteError, match="not a file; remove it"):
        files.write_whole(tmp_path, "")


def test_the_limit_on_file_sizes_is_met_like_a_full_disk(tmp_path):
    code = f"""
    import resource
    from moepp.io import files
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for write in (lambda: files.write_whole({str(tmp_path / "a")!r}, b"x" * 5000), lambda: stream()):
        try:
            write()
        except files.WriteError as error:
            print(error)
    """
    stream = f"""
    def stream():
        with files.new_file({str(tmp_path / "b")!r}) as stream:
            stream.write(b"x" * 5000)
    """
    source = textwrap.dedent(stream) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("the file is larger than allowed; raise the limit (ulimit -f)") == 2, done.stdout
    assert names(tmp_path) == []
