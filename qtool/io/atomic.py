"""Files and folders that appear whole or not at all: sibling temporary, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from qtool.errors import OutputExistsError, QtoolError, UsageError

Writer = Callable[[BinaryIO], None]

_HOST = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:20] or "local"
_TEMPORARY = re.compile(r"\..*\.qtool-(?P<host>[A-Za-z0-9]+)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp")
_STALE_SECONDS = 24 * 3600.0
_REMEDIES = {
    errno.ENOSPC: "free some space on that disk, or choose another place",
    errno.EDQUOT: "free some space on that disk, or choose another place",
    errno.EACCES: "choose a place you may write to",
    errno.EPERM: "choose a place you may write to",
    errno.EROFS: "choose a place you may write to",
    errno.EEXIST: "a part of that path is a file; choose a folder",
    errno.ENOTDIR: "a part of that path is a file; choose a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def output_exists(path: Path) -> OutputExistsError:
    """The error for an output that is already there; it names both ways out."""
    return OutputExistsError(
        f"{path} exists already",
        remedy="replace it with --overwrite, or leave it and go on with --skip-existing",
    )


def write_file(
    path: Path,
    content: Writer | bytes,
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a file so that it appears whole or not at all.

    Missing parent folders are made. A symbolic link is followed: its target is replaced. The file
    gets mode `0o666 & ~umask`, whether it is new or replaced.

    Args:
        path: Where the file goes.
        content: The bytes, or a function that writes them to the open binary file it is given.
        overwrite: Whether an existing file may be replaced.
        check: Given the complete file under a temporary name; if it raises, that file is removed
            and `path` stays as it was.

    Raises:
        OutputExistsError: The file exists and `overwrite` is false.
        UsageError: `path` is a folder.
        QtoolError: The file system refuses (full, read-only, no permission).
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UsageError(f"{path} is a folder, not a file", remedy="name a file inside it")
    if target.exists() and not overwrite:
        raise output_exists(path)
    temporary = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_through(temporary, content)
        if check is not None:
            check(temporary)
        if not _move_into_place(temporary, target, overwrite=overwrite):
            raise output_exists(path)
        _sync_folder(target.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_folder(
    folder: Path,
    files: Mapping[str, Writer | bytes],
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write files that belong together into a folder of their own.

    All of them are complete before one is seen. A new folder appears with all or not at all. In
    one that is there, anything else stays, and the last file is gone while old and new ones may be
    mixed: where it is, all are of one run.

    Args:
        folder: Where they go; missing folders above it are made, and a link is followed.
        files: Their names and contents, made in this order.
        overwrite: Whether files of these names may be replaced.
        check: Given the first file, complete under a temporary name, before the others are made; if
            it raises, nothing changes.

    Raises:
        OutputExistsError: One of the files exists and `overwrite` is false.
        UsageError: `folder` is a file.
        QtoolError: The file system refuses (full, read-only, no permission).
    """
    target = Path(os.path.realpath(folder))
    is_new = not target.exists()
    if not (is_new or target.is_dir()):
        raise UsageError(f"{folder} is a file, not a folder", remedy="name another")
    for name in () if overwrite else files:
        if (target / name).exists():
            raise output_exists(folder / name)
    temporary = _temporary_name(target if is_new else target / "folder")
    try:
        sweep(temporary.parent)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            _write_through(temporary / name, content)
            if check is not None:
                check(temporary / name)
                check = None
        _sync_folder(temporary)
        if is_new:
            os.rename(temporary, target)
        else:
            *others, last = files
            if overwrite:
                (target / last).unlink(missing_ok=True)
            for name in (*others, last):
                if not _move_into_place(temporary / name, target / name, overwrite=overwrite):
                    raise output_exists(folder / name)
            _sync_folder(target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and is_new and target.exists():
            raise output_exists(folder) from error
        raise _refused(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(directory: Path) -> list[Path]:
    """Remove temporary files and folders that an interrupted run left in a folder.

    One goes when the process that made it, on this machine, is dead, or when nobody has touched it
    for a day.

    Args:
        directory: The folder to look in; other sub-folders are left alone.

    Returns:
        What was removed.
    """
    removed = []
    with contextlib.suppress(OSError):
        for entry in sorted(directory.iterdir()):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None or not _is_stale(entry, match["host"], int(match["pid"])):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
                removed.append(entry)
    return removed


def _refused(path: Path, error: OSError) -> QtoolError:
    return QtoolError(
        f"cannot write {path}: {error.strerror or error}",
        remedy=_REMEDIES.get(error.errno or 0, ""),
    )


def _temporary_name(target: Path) -> Path:
    # The stem is cut because a name that just fits the file system must still fit with the suffix.
    stem = target.name[:40]
    return target.with_name(f".{stem}.qtool-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _write_through(temporary: Path, content: Writer | bytes) -> None:
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(temporary: Path, target: Path, *, overwrite: bool) -> bool:
    if not overwrite:
        # A hard link fails if somebody else made the file meanwhile; a rename would replace it.
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:
            if target.exists():
                return False
        else:
            return True
    os.replace(temporary, target)
    return True


def _sync_folder(folder: Path) -> None:
    # Not every file system lets a folder be opened or synced; the file itself is safe already.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_stale(entry: Path, host: str, pid: int) -> bool:
    try:
        if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
            return True
    except OSError:
        return False
    return host == _HOST and os.name == "posix" and not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
