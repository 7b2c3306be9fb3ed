"""Every result has a place of its own before work starts."""

from pathlib import Path

import pytest

from qtool.api.demoire.jobs import make_plan, settings_hash
from qtool.errors import OutputExistsError, UsageError
from qtool.io.journal import Journal, Record
from qtool.models.sources import sha256
from qtool.settings.base import CommonSettings
from qtool.settings.demoire import DemoireSettings


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png", "sub/a.jpg", "sub/deep/c.TIF", ".hidden.jpg", "notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "photos"


SHAPING = {
    "head": "linear",
    "transform": "signed",
    "output_format": "png",
    "quality": 95,
    "bit_depth": "8",
    "metadata": "no-gps",
    "first_frame": True,
    "tile": 256,
    "overlap": 8,
    "strength": 0.5,
    "keep_colour": False,
    "force": True,
}
"""What changes a result, so that `--skip-existing` makes it again."""

ELSEWHERE = {"model", "weights", "mask"}
"""What does so through the content of a file."""

HARMLESS = {
    *("paths", "files_from", "out", "recursive", "include", "exclude", "on_error", "preview"),
    *("max_memory", "overwrite", "skip_existing", "resume"),
    *CommonSettings.model_fields,
}


def planned(*paths, out, listed=(), share=(0, 1), **settings):
    request = DemoireSettings(paths=tuple(map(str, paths)), out=str(out), **settings)
    return make_plan(request, listed=listed, share=share)


def places(plan, out):
    return [job.output.relative_to(out).as_posix() for job in plan.jobs]


def test_folders_are_mirrored(folder, tmp_path):
    plan = planned(folder, out=tmp_path / "out")
    assert places(plan, tmp_path / "out") == ["a.jpg", "b.png", "sub/a.jpg", "sub/deep/c.TIF"]
    assert plan.ignored == 1
    flat = planned(folder, out=tmp_path / "out", recursive=False)
    assert places(flat, tmp_path / "out") == ["a.jpg", "b.png"]


def test_patterns_choose(folder, tmp_path):
    out = tmp_path / "out"
    assert places(planned(folder, out=out, include=("*.jpg",)), out) == ["a.jpg", "sub/a.jpg"]
    assert places(planned(folder, out=out, exclude=("sub/*",)), out) == ["a.jpg", "b.png"]


def test_results_inside_the_folder_are_not_taken_again(folder):
    out = folder / "clean"
    out.mkdir()
    (out / "a.jpg").write_bytes(b"x")
    plan = planned(folder, out=out, overwrite=True)
    assert "clean/a.jpg" not in places(plan, out)


def test_a_format_changes_the_names(folder, tmp_path):
    out = tmp_path / "out"
    plan = planned(folder / "sub", out=out, output_format="png")
    assert places(plan, out) == ["a.png", "deep/c.png"]


def test_two_results_never_share_a_place(folder, tmp_path):
    (folder / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="both become"):
        planned(folder, out=tmp_path / "out", output_format="jpg")
    with pytest.raises(UsageError, match="both become"):
        planned(folder / "a.jpg", folder / "sub" / "a.jpg", out=tmp_path / "out")


def test_a_source_is_never_replaced(folder):
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match="would replace"):
            planned(folder, out=folder, **flags)
    with pytest.raises(UsageError, match="would replace"):
        planned(folder / "a.jpg", out=folder / "a.jpg", overwrite=True)


def test_existing_results_are_seen_before_work_starts(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.png").write_bytes(b"x")
    with pytest.raises(OutputExistsError):
        planned(folder, out=out)
    plan = planned(folder, out=out, skip_existing=True)
    assert [job.name for job in plan.done] == [str(folder / "b.png")]


def test_one_photograph_may_go_to_a_file(folder, tmp_path):
    plan = planned(folder / "a.jpg", out=tmp_path / "new.png")
    assert (plan.root, plan.jobs[0].output, plan.jobs[0].kind) == (
        None,
        tmp_path / "new.png",
        "png",
    )
    with pytest.raises(UsageError, match="does not end like"):
        planned(folder / "a.jpg", out=tmp_path / "new.png", output_format="jpg")
    with pytest.raises(UsageError, match="takes one photograph"):
        planned(folder, out="-")


def test_stdin_needs_a_name(tmp_path):
    with pytest.raises(UsageError, match="has no name"):
        planned(Path("-"), out=tmp_path / "out")


def test_lists_are_added_and_shared(folder, tmp_path):
    listed = [str(folder / "a.jpg"), str(folder / "b.png")]
    out = tmp_path / "out"
    assert places(planned(out=out, listed=listed), out) == ["a.jpg", "b.png"]
    assert places(planned(out=out, listed=listed, share=(1, 2)), out) == ["b.png"]


@pytest.mark.parametrize(("paths", "said"), [((), "no photographs"), (("nowhere",), "nowhere")])
def test_nothing_to_do_is_an_error(tmp_path, paths, said):
    with pytest.raises(UsageError, match=said):
        planned(*paths, out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no photographs"):
        planned(tmp_path / "empty", out=tmp_path / "out")


def test_every_setting_is_known_to_shape_a_result_or_not():
    assert set(SHAPING) | ELSEWHERE | HARMLESS == set(DemoireSettings.model_fields)


def test_what_shapes_a_result_changes_its_fingerprint(tmp_path):
    def fingerprint(weights="w", **changed):
        return settings_hash(DemoireSettings(out="out", **changed), weights)

    plain = fingerprint()
    assert plain == fingerprint(skip_existing=True, workers=2)
    found = {name: fingerprint(**{name: value}) for name, value in SHAPING.items()}
    found["weights"] = fingerprint("other")
    for shade in (0, 255):
        mask = tmp_path / "mask.png"
        mask.write_bytes(bytes([shade]))
        found[f"mask of {shade}"] = fingerprint(mask=mask)
    assert len({plain, *found.values()}) == 1 + len(found)


def test_another_photograph_under_the_same_name_is_restored_again(tmp_path):
    source, out = tmp_path / "a.jpg", tmp_path / "out"
    out.mkdir()
    source.write_bytes(b"first")
    (out / "a.jpg").write_bytes(b"result")
    record = Record(
        output="a.jpg",
        input=str(source),
        input_sha256=sha256(source),
        settings_sha256=settings_hash(DemoireSettings(out=str(out)), ""),
        output_sha256=sha256(out / "a.jpg"),
        status="ok",
        time="2026-01-01T00:00:00+00:00",
    )
    Journal(out).add(record)
    assert len(planned(source, out=out, skip_existing=True).done) == 1
    source.write_bytes(b"second")
    plan = planned(source, out=out, skip_existing=True)
    assert (len(plan.done), plan.replace) == (0, {out / "a.jpg"})
