"""`train demoire` on folders."""

from pathlib import Path

import pytest
import torch

from qtool.api import train_run
from qtool.api.moire import synthesize_moire
from qtool.api.train import plan_demoire, train_demoire
from qtool.errors import (
    CheckpointError,
    MissingCheckpointError,
    MissingError,
    OutputExistsError,
    UsageError,
)
from qtool.io import images
from qtool.models import demoire, demoire_weights
from qtool.settings.moire import MoireSettings
from qtool.settings.train import TrainDemoireSettings


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Pairs with strong bands, photographs of a grey screen, clean pictures; small measurements."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_run, "_HELD_OUT_SAMPLES", 4)
    random = torch.Generator().manual_seed(0)
    wave = torch.sin(torch.arange(96) * 0.9)
    bands = torch.stack([wave, -wave, wave.roll(2)])[:, None, :] * 0.15
    for index in range(4):
        level = 0.3 + 0.1 * index
        images.save_png(Path(f"pairs/clean/{index}.png"), torch.full((3, 96, 96), level))
        images.save_png(Path(f"pairs/moire/{index}.png"), level + bands.expand(3, 96, 96))
        images.save_png(Path(f"moire/{index}.png"), 0.5 * (1 + bands.expand(3, 96, 96)))
        images.save_png(Path(f"clean/{index}.png"), torch.rand(3, 96, 96, generator=random))


def settings(**values):
    return TrainDemoireSettings.build(
        {
            "out": Path("w.safetensors"),
            "pairs": Path("pairs"),
            "init": "none",
            "width": 8,
            "steps": 4,
            "batch_size": 2,
            "crop": 64,
            "learning_rate": 0.02,
            "save_every": 2,
            "device": "cpu",
            **values,
        }
    )


def unpaired(**values):
    return settings(**{"pairs": None, "moire": Path("moire"), "clean": Path("clean"), **values})


def test_training_helps_and_writes_weights_that_load():
    result = train_demoire(settings(steps=40, save_every=20))
    scores = result.summary["held_out_psnr"]
    assert scores["after"] > scores["untouched"] + 1
    loaded = demoire_weights.load_network(Path("w.safetensors"))
    assert loaded.spec.name == "bandgate"
    assert loaded.arguments["width"] == 8
    assert loaded.provenance["held_out_psnr"] == scores
    assert loaded.provenance["data"] == {"pairs": 4}
    assert not Path(".w.safetensors.resume").exists()


def test_unpaired_photographs_are_enough():
    result = train_demoire(unpaired())
    assert result.status == "ok"
    provenance = demoire_weights.load_network(Path("w.safetensors")).provenance
    assert provenance["data"]["patterns"] > 0


def test_a_generator_paints_further_pairs():
    synthesize_moire(
        MoireSettings.build(
            {
                "out": Path("painted"),
                "moire": Path("moire"),
                "clean": Path("clean"),
                "count": 1,
                "patch_size": 64,
                "steps": 1,
                "width": 8,
                "save_generator": Path("g.safetensors"),
                "device": "cpu",
            }
        )
    )
    result = train_demoire(unpaired(generator=Path("g.safetensors"), steps=2))
    assert result.status == "ok"


def test_training_goes_on_from_weights():
    train_demoire(settings(steps=20))
    first = demoire_weights.load_network(Path("w.safetensors")).provenance["held_out_psnr"]
    more = train_demoire(settings(init="w.safetensors", width=None, out=Path("x.safetensors")))
    assert more.summary["held_out_psnr"]["before"] == pytest.approx(first["after"], abs=0.02)
    with pytest.raises(UsageError, match="--width"):
        train_demoire(settings(init="w.safetensors", out=Path("y.safetensors")))


def test_a_killed_training_goes_on_and_ends_alike():
    whole = train_demoire(settings(out=Path("whole.safetensors")))

    def stop(stage, done, total, note=""):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_demoire(settings(), progress=stop)
    for other in ({"seed": 1}, {"learning_rate": 1e-3}, {"batch_size": 3}):
        with pytest.raises(CheckpointError, match="other settings"):
            train_demoire(settings(**other, resume=True))
    cut = train_demoire(settings(resume=True))
    assert cut.summary["held_out_psnr"] == whole.summary["held_out_psnr"]
    assert Path("w.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    assert not list(Path().glob(".*.resume"))


def test_the_seed_and_what_is_there_are_respected(stale):
    left = stale(Path())
    train_demoire(settings(steps=2))
    first = Path("w.safetensors").read_bytes()
    assert not left.exists()
    for act in (train_demoire, plan_demoire):
        with pytest.raises(OutputExistsError):
            act(settings(steps=2))
        assert "skipped" in str(act(settings(steps=2, skip_existing=True)).summary)
    assert Path("w.safetensors").read_bytes() == first
    weights = []
    for seed in (0, 1):
        more = settings(
            init="w.safetensors", width=None, out=Path("more.safetensors"), steps=8, seed=seed
        )
        assert train_demoire(more.model_copy(update={"overwrite": True})).summary["best_step"] > 0
        weights.append(
            demoire_weights.load_network(Path("more.safetensors")).module.gates[0].weight
        )
    assert not torch.equal(*weights)


def test_a_budget_decides_on_the_steps():
    assert 1 <= train_demoire(settings(budget=0.005)).summary["steps"] < 100


def test_only_gentle_networks_have_a_free_width():
    with pytest.raises(UsageError, match="no free width"):
        train_demoire(settings(model="mbcnn"))


def test_missing_bundled_weights_are_exit_4(monkeypatch):
    monkeypatch.setattr(demoire, "BUNDLED", "none.safetensors")
    with pytest.raises(MissingError):
        train_demoire(settings(init="bundled", width=None))


def test_photographs_without_flat_parts_are_named():
    for path in Path("moire").iterdir():
        path.write_bytes(Path("clean/0.png").read_bytes())
    with pytest.raises(UsageError, match="flat and grey"):
        train_demoire(unpaired())


def test_a_plan_counts_and_writes_nothing():
    plan = plan_demoire(unpaired(budget=30))
    assert plan.summary["pictures"] == {"moire": 4, "clean": 4}
    assert plan.summary["steps"] is None
    assert plan.summary["estimated_seconds"] == 30 * 60
    few, many = (plan_demoire(unpaired(steps=steps)).summary for steps in (10, 1_000_000))
    assert 0 < few["estimated_seconds"] < many["estimated_seconds"]
    assert not Path("w.safetensors").exists()


def test_a_plan_misses_what_the_run_would():
    with pytest.raises(MissingCheckpointError, match=r"absent\.pth"):
        plan_demoire(settings(init="absent.pth", width=None))


def test_a_budget_is_kept_by_the_clock(monkeypatch):
    monkeypatch.setattr(train_run.TrainRun, "_affordable", lambda run, minutes: 1)
    result = train_demoire(settings(budget=0.08, save_every=1000))
    assert result.summary["steps"] > 1
    assert 4.0 < result.summary["seconds"] < 40
    loaded = demoire_weights.load_network(Path("w.safetensors"))
    assert loaded.provenance["recipe"]["minutes"] == 0.08
    assert loaded.provenance["recipe"]["steps"] == result.summary["steps"]


def test_esdnet_from_scratch_starts_as_the_identity():
    result = train_demoire(settings(model="esdnet", width=None, steps=1, batch_size=1))
    scores = result.summary["held_out_psnr"]
    assert scores["before"] == pytest.approx(scores["untouched"], abs=1e-3)
    loaded = demoire_weights.load_network(Path("w.safetensors"))
    assert loaded.residual
