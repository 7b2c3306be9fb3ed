"""`synthesize moire` on folders."""

import json
from pathlib import Path

import pytest
import torch

from qtool.api import moire, moire_training
from qtool.api.moire import plan_moire, synthesize_moire
from qtool.errors import CheckpointError, OutputExistsError, UsageError
from qtool.io import images
from qtool.settings.moire import MoireSettings


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Three moire photographs and two clean pictures of other things."""
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    bands = torch.sin(torch.arange(160) * 0.9) * 0.1
    for index in range(3):
        photo = 0.5 + bands + 0.02 * torch.randn(3, 160, 160, generator=random)
        images.save_png(Path(f"moire/{index}.png"), photo)
    for index in range(2):
        images.save_png(Path(f"clean/{index}.png"), torch.rand(3, 150, 150, generator=random))


def settings(**values):
    return MoireSettings.build(
        {"out": Path("pairs"), "count": 3, "patch_size": 64, "device": "cpu", **values}
    )


def learning(**values):
    given = {"moire": Path("moire"), "clean": Path("clean"), "steps": 2, "width": 8}
    return settings(**{**given, **values})


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_simulated_pairs_lie_side_by_side_with_their_numbers():
    result = synthesize_moire(settings(simulate=True, clean=Path("clean")))
    assert result.status == "ok"
    assert names("pairs") == ["clean", "moire", "parameters", "sheet.png"]
    assert names("pairs/moire") == names("pairs/clean") == ["00000.png", "00001.png", "00002.png"]
    facts = json.loads(Path("pairs/parameters/00001.json").read_text())
    assert facts["capture"]["pose"]["scale"] > 0
    assert images.load_rgb(Path("pairs/moire/00002.png")).size == (64, 64)
    assert [item["status"] for item in result.items] == ["ok"] * 3


def test_simulation_goes_on_where_it_was_stopped():
    synthesize_moire(settings(simulate=True, count=2, out=Path("half")))
    synthesize_moire(settings(simulate=True, out=Path("whole")))
    before = Path("half/moire/00000.png").stat().st_mtime_ns
    synthesize_moire(settings(simulate=True, out=Path("half"), resume=True))
    assert Path("half/moire/00000.png").stat().st_mtime_ns == before
    for index in range(3):
        name = f"moire/0000{index}.png"
        assert Path("half", name).read_bytes() == Path("whole", name).read_bytes()


def test_the_seed_decides_every_pair():
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        synthesize_moire(settings(simulate=True, count=1, out=Path(out), seed=seed))
    one, two, three = (Path(out, "moire/00000.png").read_bytes() for out in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_existing_output_is_refused_or_skipped(stale):
    left = stale(Path("pairs"))
    synthesize_moire(settings(simulate=True, count=1))
    assert not left.exists()
    with pytest.raises(OutputExistsError):
        synthesize_moire(settings(simulate=True))
    skipped = synthesize_moire(settings(simulate=True, skip_existing=True))
    assert skipped.summary["status"] == "skipped"
    assert names("pairs/moire") == ["00000.png"]


def test_painted_pairs_and_a_generator_that_serves_again():
    file = Path("g.safetensors")
    result = synthesize_moire(learning(save_generator=file))
    assert names("pairs") == ["clean", "group-1.png", "moire", "parameters", "sheet.png"]
    assert result.summary["groups"] == 1
    assert not list(Path("pairs").glob(".resume*"))
    again = synthesize_moire(learning(generator=file, out=Path("more")))
    assert again.summary["generator"] == str(file)
    assert names("more/moire") == names("pairs/moire")
    facts = json.loads(Path("more/parameters/00000.json").read_text())
    assert facts["damage"] <= result.summary["thresholds"][0]
    other = learning(generator=file, out=Path("other"), seed=1)
    synthesize_moire(other)
    painted = (Path(folder, "moire/00000.png").read_bytes() for folder in ("more", "other"))
    assert len(set(painted)) == 2
    with pytest.raises(OutputExistsError, match=r"g\.safetensors"):
        synthesize_moire(learning(save_generator=file, out=Path("last")))


def test_a_killed_training_goes_on_and_ends_alike(monkeypatch):
    whole = learning(steps=4, out=Path("whole"), save_generator=Path("whole.safetensors"))
    synthesize_moire(whole)
    monkeypatch.setattr("qtool.api.moire_training._SAVE_SECONDS", -1.0)

    def stop(stage, done, total, note=""):
        if done == 2:
            raise KeyboardInterrupt

    options = {"steps": 4, "out": Path("cut"), "save_generator": Path("cut.safetensors")}
    with pytest.raises(KeyboardInterrupt):
        synthesize_moire(learning(**options), progress=stop)
    with pytest.raises(CheckpointError, match="other settings"):
        synthesize_moire(learning(**{**options, "steps": 5, "resume": True}))
    synthesize_moire(learning(**options, resume=True))
    assert Path("cut.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_a_plan_counts_and_writes_nothing():
    plan = plan_moire(learning())
    assert plan.summary["pictures"] == {"moire": 3, "clean": 2}
    assert plan.summary["training_steps"] == 2
    assert plan_moire(settings(simulate=True)).summary["training_steps"] == 0
    assert not Path("pairs").exists()


def test_a_plan_tells_the_time_that_grows_with_the_work(monkeypatch):
    monkeypatch.setattr(moire_training, "warm_seconds", lambda work, device: work() and 2.0)

    def seconds(**options):
        return plan_moire(learning(**options)).summary["estimated_seconds"]

    one_group = seconds(steps=1000, groups=1)
    assert one_group - seconds(steps=100, groups=1) == 2 * 900
    assert seconds(budget=10, groups=1) == one_group - 2 * 1000 + 600
    assert seconds(steps=1000, groups=4) > 3 * one_group
    assert seconds(count=1000) > 500

    def simulating(count, workers=0):
        plan = plan_moire(settings(simulate=True, count=count, workers=workers))
        return plan.summary["estimated_seconds"]

    assert simulating(100_000) > 5 * simulating(1000)
    assert simulating(100_000) > 1.2 * simulating(100_000, workers=8)


def test_pictures_that_are_too_small_are_named():
    with pytest.raises(UsageError, match="512 pixels"):
        synthesize_moire(learning(patch_size=512))


def test_something_else_is_no_generator():
    synthesize_moire(settings(simulate=True, count=1))
    with pytest.raises(CheckpointError):
        synthesize_moire(learning(generator=Path("pairs/sheet.png"), out=Path("x")))


def test_the_sheet_has_moire_above_clean():
    pairs = [(torch.full((3, 8, 8), value), torch.full((3, 8, 8), -value)) for value in (1.0, 2.0)]
    assert moire._sheet(pairs)[:, 0, 0, 0].tolist() == [1, 2, -1, -2]


def test_processes_make_the_same_pairs():
    for out, workers in (("alone", 0), ("shared", 2)):
        synthesize_moire(settings(simulate=True, out=Path(out), workers=workers))
    files = sorted(path.relative_to("alone") for path in Path("alone").rglob("*.*"))
    assert len(files) == 10
    for name in files:
        assert Path("alone", name).read_bytes() == Path("shared", name).read_bytes()


def test_a_budget_ends_the_training_of_painters():
    plan = plan_moire(learning(budget=0.01))
    assert plan.summary["training_steps"] is None
    result = synthesize_moire(learning(steps=100_000, budget=0.01, count=1))
    assert 1 <= result.summary["training"][0]["steps"] < 1000
