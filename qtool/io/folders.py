"""Folders of pictures, with and without labels, and the check of an output before work starts."""

from __future__ import annotations

import csv
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from qtool.errors import OutputExistsError, QtoolError, UsageError
from qtool.io.atomic import output_exists

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png"}
    | {".ppm", ".tif", ".tiff", ".webp"}
)
LABELS_FILE = "labels.csv"

_LABELLED_FORMS = (
    f"use a {LABELS_FILE} with the columns file,label, or one folder per class "
    "named by its number or its WordNet id"
)


def find_images(folder: Path) -> list[Path]:
    """Find the pictures of a folder and its sub-folders.

    Hidden files and folders are left out; suffixes count in any case; links are followed.

    Args:
        folder: Where to look.

    Returns:
        The pictures in natural order: 2.png before 10.png.

    Raises:
        UsageError: The folder is absent or has no picture.
    """
    _require_folder(folder)
    images = sorted(_walk(folder, frozenset()), key=lambda path: _natural(path, folder))
    if not images:
        raise UsageError(
            f"{folder} has no pictures",
            remedy=f"pictures end in {' '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return images


def read_labelled(
    folder: Path, *, num_classes: int, wnids: Sequence[str] = ()
) -> list[tuple[Path, int]]:
    """Find the pictures of a folder and their classes.

    A `labels.csv` with the columns `file` and `label` decides if it is there. Otherwise every
    sub-folder is a class: by number, by WordNet id, or, if there are as many as the model has
    classes, in the order of their names.

    Args:
        folder: Where to look.
        num_classes: Number of classes of the model.
        wnids: The WordNet id of each class, if the classes are ImageNet's.

    Returns:
        Pictures and their labels, 0..num_classes-1, in the order of the file or in natural order.

    Raises:
        UsageError: The folder is absent or empty, or the labels are missing or wrong.
    """
    _require_folder(folder)
    table = folder / LABELS_FILE
    if table.is_file():
        return _read_table(folder, table, num_classes)
    classes = sorted(
        (entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry)),
        key=lambda entry: entry.name,
    )
    pictures = {entry.name: sorted(_walk(entry, frozenset())) for entry in classes}
    names = [name for name, found in pictures.items() if found]
    if not names:
        find_images(folder)
        raise UsageError(f"{folder} has pictures but no labels", remedy=_LABELLED_FORMS)
    labels = _class_labels(folder, names, num_classes, wnids)
    return [
        (path, label)
        for name, label in labels.items()
        for path in sorted(pictures[name], key=lambda path: _natural(path, folder))
    ]


def check_output(
    path: Path, *, overwrite: bool = False, skip_existing: bool = False, folder: bool = False
) -> bool:
    """Decide before any work whether an output is to be written, and whether it can be.

    Nothing stays behind on disk.

    Args:
        path: The output.
        overwrite: Whether it may be replaced.
        skip_existing: Whether it may be left as it is, and the work be skipped.
        folder: Whether the output is a folder; an empty one does not count as existing.

    Returns:
        True to write it, False to skip it.

    Raises:
        OutputExistsError: It exists and neither flag is given.
        UsageError: A file stands where a folder is needed or the other way round.
        QtoolError: The place cannot be written to.
    """
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise UsageError(f"{path} is a {found}; a {wanted} is needed", remedy="name another")
    exists = path.exists()
    if path.is_dir():
        _require_folder(path)
        exists = any(not _is_hidden(entry) for entry in path.iterdir())
    if exists and skip_existing:
        return False
    if exists and not overwrite:
        raise output_exists(path)
    _require_writable(path if folder else path.parent, path)
    return True


def check_files(
    folder: Path, names: Collection[str], *, overwrite: bool = False, skip_existing: bool = False
) -> bool:
    """Decide before any work whether files that belong together are to be written to a folder.

    Args:
        folder: Where they go; what else is there does not count.
        names: Their names.
        overwrite: Whether they may be replaced.
        skip_existing: Whether they may be left as they are if all are there.

    Returns:
        True to write them, False to skip them.

    Raises:
        OutputExistsError: One exists and neither flag is given, or only some are there to be left.
        UsageError: A file stands where the folder is needed or the other way round.
        QtoolError: The place cannot be written to.
    """
    check_output(folder, overwrite=True, folder=True)
    wanted = {
        name: check_output(folder / name, overwrite=overwrite, skip_existing=skip_existing)
        for name in names
    }
    missing = [name for name, is_wanted in wanted.items() if is_wanted]
    if missing and len(missing) < len(wanted):
        there = next(name for name, is_wanted in wanted.items() if not is_wanted)
        raise OutputExistsError(
            f"{folder} has a {there} but no {missing[0]}",
            remedy="replace what is there with --overwrite, or name another folder",
        )
    return bool(missing)


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        raise UsageError(f"the folder {folder} does not exist", remedy="check the path")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", remedy="name the folder that it lies in")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be read", remedy="check its permissions")


def _require_writable(place: Path, path: Path) -> None:
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(
            f"{path} cannot be written: {place} is not a folder", remedy="choose another place"
        )
    # Only a trial tells: permissions say nothing about read-only or special file systems.
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise QtoolError(
            f"{path} cannot be written: {error.strerror} for {place}",
            remedy="choose a place you may write to",
        ) from error


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    _require_folder(folder)
    for entry in folder.iterdir():
        if _is_hidden(entry):
            continue
        if entry.is_dir():
            yield from _walk(entry, above | {real})
        elif entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
            yield entry


def _natural(path: Path, folder: Path) -> list[list[tuple[int, int, str]]]:
    """A key under which numbers in names sort by value."""
    return [
        [
            (0, int(piece), piece) if piece.isdecimal() else (1, 0, piece.casefold())
            for piece in re.split(r"(\d+)", part)
            if piece
        ]
        + [(2, 0, part)]
        for part in path.relative_to(folder).parts
    ]


def _read_table(folder: Path, table: Path, num_classes: int) -> list[tuple[Path, int]]:
    labelled: dict[Path, int] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in ("file", "label") if name not in (rows.fieldnames or ())]
            if missing:
                raise UsageError(
                    f"{table} has no column {' and no column '.join(missing)}",
                    remedy="its first line must name the columns file and label",
                )
            for row in rows:
                place = f"{table}, line {rows.line_num}"
                path = _listed_path(folder, row["file"] or "", place)
                if path in labelled:
                    raise UsageError(
                        f"{place}: {row['file']!r} is listed twice",
                        remedy="remove one of the lines",
                    )
                labelled[path] = _listed_label(row["label"] or "", num_classes, place)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(
            f"{table} is not a CSV file in UTF-8: {error}", remedy=_LABELLED_FORMS
        ) from error
    if not labelled:
        raise UsageError(f"{table} lists no pictures", remedy=_LABELLED_FORMS)
    return list(labelled.items())


def _listed_path(folder: Path, name: str, place: str) -> Path:
    windows = PureWindowsPath(name)
    if not name or ".." in windows.parts or windows.anchor or PurePosixPath(name).is_absolute():
        raise UsageError(
            f"{place}: {name!r} is not a path inside the folder",
            remedy="name the files relative to the folder, without '..'",
        )
    path = folder / name
    if not os.path.isfile(path):
        raise UsageError(
            f"{place}: {name!r} does not exist", remedy="remove the line or bring the file back"
        )
    return path


def _listed_label(text: str, num_classes: int, place: str) -> int:
    text = text.strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= num_classes:
        raise UsageError(
            f"{place}: label {text!r} is not in 0..{num_classes - 1}",
            remedy="labels are whole numbers, counted from 0, below the model's number of classes",
        )
    return int(text)


def _class_labels(
    folder: Path, names: Sequence[str], num_classes: int, wnids: Sequence[str]
) -> dict[str, int]:
    index = {wnid: label for label, wnid in enumerate(wnids)}
    if all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        labels = {name: int(name) for name in names}
        outside = [name for name in names if labels[name] >= num_classes]
        if outside:
            raise UsageError(
                f"the class folder {folder / outside[0]} is not in 0..{num_classes - 1}",
                remedy=_LABELLED_FORMS,
            )
        if len(set(labels.values())) < len(labels):
            raise UsageError(
                f"two class folders of {folder} have the same number", remedy="rename one"
            )
        return dict(sorted(labels.items(), key=lambda item: item[1]))
    if all(name in index for name in names):
        return {name: index[name] for name in sorted(names, key=lambda name: index[name])}
    if len(names) == num_classes:
        return {name: label for label, name in enumerate(names)}
    raise UsageError(
        f"{folder} has {len(names)} class folders with names, the model has {num_classes} classes",
        remedy=_LABELLED_FORMS,
    )
