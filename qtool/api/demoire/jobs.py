"""Which photographs a run takes, where each result goes, and which are done already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from qtool.errors import UsageError
from qtool.io import folders, journal, photos
from qtool.io.atomic import output_exists
from qtool.io.photos import Kind
from qtool.models.sources import sha256
from qtool.settings.demoire import DemoireSettings

STREAM = "-"
_KINDS: dict[str, tuple[Kind, str]] = {
    "jpg": ("jpeg", ".jpg"),
    "png": ("png", ".png"),
    "tiff": ("tiff", ".tif"),
    "webp": ("webp", ".webp"),
    "avif": ("avif", ".avif"),
    "heic": ("heif", ".heic"),
    "bmp": ("bmp", ".bmp"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One photograph to restore.

    Attributes:
        source: Where it is read from; None for stdin.
        output: Where the result goes; None for stdout.
        name: What to call it.
        kind: Format of the result; None keeps the source's.
    """

    source: Path | None
    output: Path | None
    name: str
    kind: Kind | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of one process.

    Attributes:
        jobs: What to do, in order.
        done: Photographs whose results are there already.
        root: Folder of the results and of their journal; None for single files.
        ignored: Files in the folders that are no photographs.
        replace: Whether results that exist are replaced.
    """

    jobs: tuple[Job, ...]
    done: tuple[Job, ...]
    root: Path | None
    ignored: int
    replace: frozenset[Path]


def settings_hash(settings: DemoireSettings, weights_sha256: str) -> str:
    """The SHA-256 of everything that shapes a result apart from its source."""
    shaping = settings.model_dump(
        include={
            "head",
            "transform",
            "output_format",
            "quality",
            "bit_depth",
            "metadata",
            "first_frame",
            "tile",
            "overlap",
            "strength",
            "keep_colour",
            "force",
        },
        mode="json",
    )
    mask = sha256(settings.mask) if settings.mask is not None else ""
    text = repr((sorted(shaping.items()), weights_sha256, mask))
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    settings: DemoireSettings,
    *,
    listed: Sequence[str] = (),
    weights_sha256: Callable[[], str] = str,
    share: tuple[int, int] = (0, 1),
) -> Plan:
    """Find the photographs and decide about every result before work starts.

    Args:
        settings: The request.
        listed: Further photographs, from `--files-from`.
        weights_sha256: Gives the SHA-256 of the weights, if it is needed.
        share: Number of this process and of all; each takes its share of the list.

    Raises:
        UsageError: Nothing to do, or two results would go to one place, or one onto a source.
        OutputExistsError: A result exists and nothing says what to do then.
    """
    named = [*settings.paths, *listed]
    if not named:
        raise UsageError(
            "no photographs were named",
            remedy="name files or folders, - for stdin, or a list with --files-from",
        )
    found, ignored = _found(settings, named)
    root = _root(settings, named, found)
    jobs = [_job(settings, source, inside, root) for source, inside in found]
    _check_places(jobs)
    jobs = jobs[share[0] :: share[1]]
    todo, done, replace = _undone(settings, jobs, root, weights_sha256)
    if root is not None:
        folders.check_output(root, overwrite=True, folder=True)
    elif todo and todo[0].output is not None:
        folders.check_output(todo[0].output, overwrite=True)
    return Plan(
        jobs=tuple(todo), done=tuple(done), root=root, ignored=ignored, replace=frozenset(replace)
    )


def _found(
    settings: DemoireSettings, named: Iterable[str]
) -> tuple[list[tuple[Path | None, Path]], int]:
    """Each photograph, with its place inside the folder it was found through."""
    found: dict[tuple[Path | None, Path], None] = {}
    ignored = 0
    out = Path(os.path.realpath(settings.out)) if settings.out != STREAM else None
    for name in named:
        if name == STREAM:
            found[None, Path("stdin")] = None
            continue
        path = Path(name)
        if not path.exists():
            raise UsageError(f"{name} does not exist", remedy="check the path")
        if not path.is_dir():
            found[path, Path(path.name)] = None
            continue
        for entry in _walk(path, out, settings.recursive, frozenset()):
            inside = entry.relative_to(path)
            if entry.suffix.lower() not in photos.SUFFIXES:
                ignored += 1
            elif _is_wanted(settings, inside):
                found[entry, inside] = None
    if not found:
        raise UsageError(
            "there are no photographs in what was named",
            remedy=f"photographs end in {' '.join(sorted(photos.SUFFIXES))}",
        )
    return list(found), ignored


def _walk(folder: Path, out: Path | None, recursive: bool, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            # Results of an earlier run are no photographs to restore.
            if recursive and Path(os.path.realpath(entry)) != out:
                yield from _walk(entry, out, recursive, above | {real})
        elif entry.is_file():
            yield entry


def _is_wanted(settings: DemoireSettings, inside: Path) -> bool:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch(str(inside), p) or fnmatch(inside.name, p) for p in patterns)

    return (not settings.include or matches(settings.include)) and not matches(settings.exclude)


def _root(
    settings: DemoireSettings, named: Sequence[str], found: Sequence[tuple[Path | None, Path]]
) -> Path | None:
    """The folder of the results, or None if `--out` names a single file or stdout."""
    out = Path(settings.out)
    single = len(found) == 1 and len(named) == 1 and not Path(named[0]).is_dir()
    is_file = settings.out == STREAM or (
        out.suffix.lower() in photos.SUFFIXES and not out.is_dir() and single
    )
    if is_file and not single:
        raise UsageError(
            f"{settings.out!r} takes one photograph, and {len(found)} were found",
            remedy="name a folder with --out",
        )
    if not is_file and found[0][0] is None:
        raise UsageError(
            "a photograph from stdin has no name", remedy="name a file with --out, or - for stdout"
        )
    return None if is_file else out


def _job(settings: DemoireSettings, source: Path | None, inside: Path, root: Path | None) -> Job:
    kind, suffix = _KINDS.get(settings.output_format, (None, ""))
    name = str(source) if source is not None else STREAM
    if root is not None:
        output: Path | None = root / (inside.with_suffix(suffix) if suffix else inside)
    else:
        output = None if settings.out == STREAM else Path(settings.out)
        if output is not None:
            own = photos.SUFFIXES[output.suffix.lower()]
            if kind not in (None, own):
                raise UsageError(
                    f"{output} does not end like {settings.output_format}",
                    remedy="let the name of the result fit --format",
                )
            kind = own
    return Job(source=source, output=output, name=name, kind=kind)


def _check_places(jobs: Sequence[Job]) -> None:
    sources = {os.path.realpath(job.source): job.source for job in jobs if job.source}
    places: dict[str, Job] = {}
    for job in jobs:
        if job.output is None:
            continue
        place = os.path.realpath(job.output)
        if place in sources:
            raise UsageError(
                f"the result {job.output} would replace the photograph {sources[place]}",
                remedy="choose another folder with --out",
            )
        if place in places:
            raise UsageError(
                f"{places[place].name} and {job.name} would both become {job.output}",
                remedy="restore them into different folders",
            )
        places[place] = job


def _undone(
    settings: DemoireSettings,
    jobs: Sequence[Job],
    root: Path | None,
    weights_sha256: Callable[[], str],
) -> tuple[list[Job], list[Job], set[Path]]:
    """Split jobs into what is to do and what is done, with the results to be replaced."""
    todo: list[Job] = []
    done: list[Job] = []
    replace: set[Path] = set()
    known = journal.read_journal(root) if root is not None and settings.skip_existing else {}
    ours = settings_hash(settings, weights_sha256()) if known else ""
    for job in jobs:
        if job.output is None or not job.output.exists():
            todo.append(job)
            continue
        if not settings.overwrite and not settings.skip_existing:
            raise output_exists(job.output)
        record = known.get(relative(job.output, root)) if root is not None else None
        if settings.overwrite or (record is not None and _is_outdated(job, record, ours)):
            todo.append(job)
            replace.add(job.output)
        else:
            done.append(job)
    return todo, done, replace


def relative(output: Path, root: Path) -> str:
    """A result's name in the journal of its folder."""
    return output.relative_to(root).as_posix()


def _is_outdated(job: Job, record: journal.Record, settings_sha256: str) -> bool:
    """Whether a result is qtool's own, and made from something else or in another way.

    A result that somebody has changed since is theirs and left alone.
    """
    if job.source is None or job.output is None:
        return False
    same = (record.settings_sha256, record.input_sha256) == (
        settings_sha256,
        sha256(job.source),
    )
    return not same and sha256(job.output) == record.output_sha256
