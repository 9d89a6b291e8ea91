"""What this library writes: whole or not there, with the mode it had, where the name points to, and no rubbish."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from loraxs_kernels import files
from loraxs_kernels.files import damaged, read_json, target_of, write_atomically


def test_a_file_that_is_replaced_keeps_its_mode_and_a_new_one_gets_the_usual_one(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    for mode in (0o600, 0o640, 0o664):
        path.chmod(mode)
        write_atomically(path, b"new ", memoryview(b"content"))
        assert path.read_bytes() == b"new content" and stat.S_IMODE(path.stat().st_mode) == mode


def test_links_stay_links(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, dangling = tmp_path / "there" / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_bytes(b"old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "there" / "new")
    write_atomically(link, b"new")
    write_atomically(dangling, b"newer")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert dangling.is_symlink() and (tmp_path / "there" / "new").read_bytes() == b"newer"


def test_what_is_no_regular_file_is_refused(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reading, writing = os.pipe()
    pipe = Path(f"/dev/fd/{writing}")  # as /dev/stdout is one, a link to what has no path
    nothing = "no regular file"
    for path, what in ((fifo, nothing), (Path("/dev/null"), nothing), (pipe, nothing), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"path: {path} is {what}, must be the name of a file"):
            write_atomically(path, b"data")
    os.close(reading)
    os.close(writing)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ValueError, match="loop is a link to itself"):
        write_atomically(loop, b"data")
    loop.unlink()
    with pytest.raises(ValueError, match="must be a name in UTF-8"):
        write_atomically("a\0b", b"data")
    for name in ("", "new/", "~/a/b", "~somebody/a"):
        with pytest.raises(ValueError, match=f"path: got '{name}', must be"):
            write_atomically(name, b"data")
    with pytest.raises(ValueError, match=r"out: .*/a/b is in .*/fifo, which is no folder"):
        target_of(fifo / "a" / "b", "out")
    assert stat.S_ISFIFO(fifo.stat().st_mode) and os.listdir(tmp_path) == ["fifo"]
    with pytest.raises(ValueError) as refused:
        damaged("file", "got " + "x" * 10**6)
    assert len(str(refused.value)) < 1100


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"kept")
    denied = [path]  # root always may
    monkeypatch.setattr(os, "access", lambda each, mode: not (mode == os.W_OK and each in denied))
    with pytest.raises(PermissionError, match=f"path is a file without permission to write: '{path}'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"kept"
    write_atomically(tmp_path / "b", b"new")
    denied.append(tmp_path)
    with pytest.raises(PermissionError, match=f"out is in a folder without permission to write: '{tmp_path}/new/c'"):
        target_of(tmp_path / "new" / "c", "out")


def test_an_open_file_is_neither_moved_nor_removed_where_the_system_refuses_that(tmp_path, monkeypatch):
    """Windows, which has no locks by fcntl either."""
    made, temporary, replace, unlink = [], files._temporary, os.replace, os.unlink

    def closed(call):
        def checked(*paths):
            assert made[-1].closed
            call(*paths)

        return checked

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "_temporary", lambda target: made.append(temporary(target)) or made[-1])
    monkeypatch.setattr(os, "replace", closed(replace))
    monkeypatch.setattr(os, "unlink", closed(unlink))
    path = tmp_path / "a"
    for data in (b"old", b"new"):
        write_atomically(path, data)
    monkeypatch.setattr(os, "fsync", lambda number: os.close(-1))  # an OSError
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_atomically(path, b"lost")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"] and len(made) == 3


def test_names_may_be_as_long_as_names_can_be_and_in_folders_that_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("n" * 255, "~name", "new/a", "new/~/a"):
        write_atomically(name, b"data")
        assert Path(name).read_bytes() == b"data"
    assert {*os.listdir(tmp_path)} == {"n" * 255, "~name", "new"} and {*os.listdir("new")} == {"a", "~"}
    os.mkdir("~")
    write_atomically("~/a", b"data")  # a folder that is there is meant
    assert os.listdir("~") == ["a"]


def forked(work: Callable[[], object]) -> int:
    """The id of a process that does this work and ends, with status 1 if it raises."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def writing(path: Path, moment: str, sent: signal.Signals) -> int:
    """The id of a process that gets this signal while it writes a file, in place of a call of os."""

    def write() -> None:
        setattr(os, moment, lambda *_: os.kill(os.getpid(), sent))
        write_atomically(path, b"new" * 1000)

    return forked(write)


def test_what_a_kill_leaves_the_next_write_removes(tmp_path):
    """But not the temporary file of a process that is still writing."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for moment in ("fsync", "replace"):
        assert os.waitpid(writing(path, moment, signal.SIGKILL), 0)[1] == signal.SIGKILL
        assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    stopped = writing(path, "fsync", signal.SIGSTOP)
    try:
        assert os.WIFSTOPPED(os.waitpid(stopped, os.WUNTRACED)[1])
        write_atomically(path, b"another")
        assert len(os.listdir(tmp_path)) == 2 and path.read_bytes() == b"another"
    finally:
        os.kill(stopped, signal.SIGKILL)
        os.waitpid(stopped, 0)
    write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == b"new"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs setrlimit")
def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError, match=f"too large: '{path}'$"):
            write_atomically(path, b"new" * 10000)

    assert os.waitpid(forked(write), 0)[1] == 0
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_file_system_that_does_not_know_its_files_again_ends_in_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with pytest.raises(OSError, match=f"no new file can be made beside it that stays where it is: '{tmp_path / 'a'}'"):
        write_atomically(tmp_path / "a", b"new")


def test_any_number_of_processes_may_write_a_file(tmp_path):
    held = [files._temporary(tmp_path / "a") for _ in range(70)]
    write_atomically(tmp_path / "a", b"new")
    for each in held:
        each.close()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed_is_no_error_once_the_file_is_there(tmp_path, monkeypatch, code):
    fsync, folders = os.fsync, []

    def of_files_alone(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            folders.append(fd)
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with nullcontext() if code == errno.EINVAL else pytest.raises(OSError, match=f"'{tmp_path / 'a'}'"):  # a bad disk
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and len(folders) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(folders[0])


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff{}", b'{"a":' * 20000, b"[" + b"9" * 5000 + b"]", b"null"])
def test_only_json_objects_are_read(text):
    with pytest.raises(ValueError, match=r"^the file: is damaged, no JSON"):
        read_json(text, "the file")
