from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from qtool.errors import OutputExistsError, QtoolError, UsageError
from qtool.io import atomic


def _leftovers(folder):
    return [path.name for path in folder.iterdir() if ".qtool-" in path.name]


def test_writes_bytes_and_makes_parents(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    atomic.write_file(path, b"hello")
    assert path.read_bytes() == b"hello"
    assert _leftovers(path.parent) == []


def test_writes_through_a_function(tmp_path):
    path = tmp_path / "file.bin"
    atomic.write_file(path, lambda file: file.write(b"abc"))
    assert path.read_bytes() == b"abc"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_umask(tmp_path, umask, mode, overwrite):
    path = tmp_path / "file.bin"
    before = os.umask(umask)
    try:
        atomic.write_file(path, b"x", overwrite=overwrite)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_existing_file_is_kept_and_both_flags_are_named(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(OutputExistsError) as caught:
        atomic.write_file(path, b"new")
    assert "--overwrite" in caught.value.remedy
    assert "--skip-existing" in caught.value.remedy
    assert path.read_bytes() == b"old"
    atomic.write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"


def test_file_made_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "file.bin"

    def slow(file):
        file.write(b"mine")
        path.write_bytes(b"theirs")

    with pytest.raises(OutputExistsError):
        atomic.write_file(path, slow)
    assert path.read_bytes() == b"theirs"
    assert _leftovers(tmp_path) == []


def test_without_hard_links_a_new_file_is_still_written(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file.bin"
    atomic.write_file(path, b"x")
    assert path.read_bytes() == b"x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_writer_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def interrupted(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        atomic.write_file(path, interrupted, overwrite=True)
    assert path.read_bytes() == b"old"
    assert _leftovers(tmp_path) == []


def test_full_disk_is_told_with_a_remedy(tmp_path):
    def full(_file):
        raise OSError(28, "No space left on device")

    with pytest.raises(QtoolError, match="No space left") as caught:
        atomic.write_file(tmp_path / "file.bin", full)
    assert "space" in caught.value.remedy


def test_a_folder_or_a_file_in_the_path_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        atomic.write_file(tmp_path, b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(QtoolError) as caught:
        atomic.write_file(tmp_path / "file" / "below", b"x")
    assert "choose a folder" in caught.value.remedy


def test_link_is_followed(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    atomic.write_file(link, b"new", overwrite=True)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_longest_name_fits(tmp_path):
    path = tmp_path / ("n" * 255)
    atomic.write_file(path, b"x")
    assert path.read_bytes() == b"x"


def test_sweep_removes_only_what_is_stale(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    pid = int(dead.stdout)
    host = atomic._HOST

    def place(name, age=0.0):
        path = tmp_path / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age, time.time() - age))
        return path

    crashed = place(f".a.png.qtool-{host}-{pid}-0123abcd.tmp")
    forgotten = place(f".b.png.qtool-elsewhere-{os.getpid()}-0123abcd.tmp", age=2 * 86400)
    running = place(f".c.png.qtool-{host}-{os.getpid()}-0123abcd.tmp")
    elsewhere = place(f".d.png.qtool-elsewhere-{pid}-0123abcd.tmp")
    foreign = place(".e.png.tmp", age=2 * 86400)
    assert atomic.sweep(tmp_path) == [crashed, forgotten]
    assert running.exists()
    assert elsewhere.exists()
    assert foreign.exists()
    assert atomic.sweep(tmp_path / "absent") == []


def test_killed_process_leaves_no_half_file_and_its_remains_are_swept(tmp_path):
    path = tmp_path / "file.bin"
    code = (
        "import os, signal, sys; from pathlib import Path; from qtool.io.atomic import write_file\n"
        "def write(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_file(Path(sys.argv[1]), write)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert done.returncode == -9
    assert not path.exists()
    assert len(atomic.sweep(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_check_sees_the_whole_file_and_can_refuse_it(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    seen = []

    def refuse(temporary):
        seen.append(temporary.read_bytes())
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        atomic.write_file(path, b"new", overwrite=True, check=refuse)
    assert seen == [b"new"]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    atomic.write_file(path, b"new", overwrite=True, check=lambda temporary: None)
    assert path.read_bytes() == b"new"


FILES = {"model": lambda file: file.write(b"weights"), "card": b"words", "config": b"{}"}


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _written(**changed):
    return {"model": b"weights", "card": b"words", "config": b"{}", **changed}


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_gets_all_its_files(tmp_path, exists):
    folder = tmp_path / "a" / "b"
    if exists:
        folder.mkdir(parents=True)
        (folder / "other").write_bytes(b"theirs")
    before = os.umask(0o027)
    try:
        atomic.write_folder(folder, FILES)
    finally:
        os.umask(before)
    assert _contents(folder) == _written(**({"other": b"theirs"} if exists else {}))
    assert (folder / "model").stat().st_mode & 0o777 == 0o640
    assert exists or folder.stat().st_mode & 0o777 == 0o750
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", FILES)
def test_one_file_that_is_there_keeps_the_others_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(OutputExistsError, match=name) as caught:
        atomic.write_folder(tmp_path, FILES)
    assert "--overwrite" in caught.value.remedy
    assert _contents(tmp_path) == {name: b"old"}
    atomic.write_folder(tmp_path, FILES, overwrite=True)
    assert _contents(tmp_path) == _written()


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UsageError, match="is a file"):
        atomic.write_folder(tmp_path / "file", FILES, overwrite=True)
    assert _contents(tmp_path) == {"file": b"old"}


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("new")
    for name, place in (("link", "real"), ("dangling", "new")):
        atomic.write_folder(tmp_path / name, FILES)
        assert (tmp_path / name).is_symlink()
        assert _contents(tmp_path / place) == _written()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("broken", FILES)
def test_an_interrupted_folder_stays_as_it_was(tmp_path, error, exists, broken):
    folder = tmp_path / "folder"
    if exists:
        atomic.write_folder(folder, FILES)

    def interrupted(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        atomic.write_folder(folder, {**FILES, broken: interrupted}, overwrite=True)
    assert list(tmp_path.iterdir()) == ([folder] if exists else [])
    assert not exists or _contents(folder) == _written()


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_while_old_and_new_are_mixed_the_last_file_is_missing(tmp_path, monkeypatch, moves):
    atomic.write_folder(tmp_path, FILES)
    replace, done = os.replace, []

    def stop(source, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            atomic.write_folder(tmp_path, dict.fromkeys(FILES, b"new"), overwrite=True)
    mixed = dict.fromkeys(list(FILES)[:moves], b"new")
    expected = _written(**mixed)
    del expected["config"]
    assert _contents(tmp_path) == expected


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path):
    folder = tmp_path / "folder"

    def slow(file):
        folder.mkdir()
        (folder / "theirs").write_bytes(b"theirs")

    with pytest.raises(OutputExistsError):
        atomic.write_folder(folder, {"model": slow})
    assert _contents(folder) == {"theirs": b"theirs"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_check_sees_the_first_file_before_the_others_are_made(tmp_path):
    folder, seen = tmp_path / "folder", []

    def card(file):
        file.write(b"checked " + seen[0])

    def look(path):
        seen.append(path.read_bytes())

    atomic.write_folder(folder, {**FILES, "card": card}, check=look)
    assert _contents(folder) == _written(card=b"checked weights")
    assert seen == [b"weights"]

    def refuse(path):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        atomic.write_folder(folder, {**FILES, "model": b"new"}, overwrite=True, check=refuse)
    assert _contents(folder) == _written(card=b"checked weights")


@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_process_leaves_no_half_folder_and_the_next_one_sweeps(tmp_path, exists):
    folder = tmp_path / "folder"
    if exists:
        folder.mkdir()
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from qtool.io.atomic import write_folder\n"
        "def write(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_folder(Path(sys.argv[1]), {'model': b'whole', 'card': write})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60, check=False)
    assert done.returncode == -9
    assert folder.exists() == exists
    assert not (folder / "model").exists()
    atomic.write_folder(folder, FILES)
    assert _contents(folder) == _written()
    assert list(tmp_path.iterdir()) == [folder]
