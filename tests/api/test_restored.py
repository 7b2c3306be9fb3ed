"""`eval` of restored pictures: counterparts found by name, values those of the metrics."""

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from qtool.api import evaluate as api
from qtool.api import restored
from qtool.errors import MissingError, UsageError
from qtool.metrics import fidelity, perceptual
from qtool.settings.evaluate import EvaluateSettings, FidelityMetric, FidelityProtocol


@pytest.fixture
def folders(tmp_path):
    """Targets, photographs with a wave added, and results with half of it left."""
    rng = np.random.default_rng(0)
    wave = 12 * np.sin(np.arange(64) / 3)[:, None]
    for name in ("a", "sub/b"):
        target = np.kron(rng.integers(40, 200, (8, 8, 3)), np.ones((8, 8, 1)))
        for folder, share, suffix in (
            ("targets", 0.0, "_gt.png"),
            ("photos", 1.0, "_moire.png"),
            ("clean", 0.5, "_moire.png"),
        ):
            path = tmp_path / folder / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((target + share * wave).round().astype(np.uint8)).save(path)
    return tmp_path


def evaluated(folders, **settings):
    chosen = {"target": str(folders / "clean"), "reference": folders / "targets", **settings}
    return api.evaluate(EvaluateSettings(device="cpu", **chosen))


def tensor(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255


def test_settings_name_what_there_is():
    assert set(get_args(FidelityProtocol)) == set(fidelity.PROTOCOLS)
    assert get_args(FidelityMetric) == (*fidelity.METRICS, perceptual.NAME, restored.HARM)


def test_values_are_means_of_what_the_metrics_say(folders):
    result = evaluated(folders, baseline=str(folders / "photos"), protocol="uhdm")
    assert result.exit_code == 0
    assert result.summary["count"] == 2
    expected = [
        fidelity.measure(
            tensor(folders / f"clean/{name}_moire.png"),
            tensor(folders / f"targets/{name}_gt.png"),
            protocol="uhdm",
        )
        for name in ("a", "sub/b")
    ]
    for metric in fidelity.METRICS:
        mean = sum(values[metric] for values in expected) / 2
        assert result.summary[metric] == pytest.approx(mean, abs=1e-3)
    assert result.summary["psnr"] - result.summary["before_psnr"] == pytest.approx(6.0, abs=0.3)
    assert result.summary["moire_luma"] < 0.6 * result.summary["before_moire_luma"]
    assert result.summary["do_no_harm"] > 30


def test_pairs_in_one_folder(folders):
    for path in (folders / "photos").rglob("*.png"):
        place = folders / "targets" / path.relative_to(folders / "photos")
        place.write_bytes(path.read_bytes())
    result = evaluated(folders, target=str(folders / "targets"), metric=("psnr",))
    assert result.summary["count"] == 2
    assert [set(item) for item in result.items] == [{"path", "status", "reference", "psnr"}] * 2


def test_what_has_no_counterpart_or_another_size_is_a_failed_item(folders):
    Image.new("RGB", (64, 64)).save(folders / "clean" / "alone.png")
    Image.new("RGB", (32, 32)).save(folders / "clean" / "a_moire.png")
    result = evaluated(folders, metric=("psnr",))
    assert result.exit_code == 3
    assert result.summary["failed"] == 2
    assert result.summary["count"] == 1


def test_gates(folders):
    high = evaluated(folders, metric=("psnr",), minimum=("psnr=90",))
    assert high.exit_code == 5
    assert evaluated(folders, minimum=("moire_luma=0.01",)).exit_code == 5
    assert evaluated(folders, minimum=("psnr=10", "moire_luma=50")).exit_code == 0
    with pytest.raises(UsageError, match="top1"):
        evaluated(folders, minimum=("top1=5",))


def test_a_plan_counts_and_times_what_can_be_read(folders):
    settings = EvaluateSettings(
        target=str(folders / "clean"), reference=folders / "targets", dry_run=True
    )
    planned = api.plan(settings)
    assert planned.status == "planned"
    assert planned.summary["count"] == 2
    assert planned.summary["estimated_seconds"] >= 1
    for path in (folders / "clean").rglob("*.*"):
        path.write_bytes(b"no picture")
    assert "estimated_seconds" not in api.plan(settings).summary


def test_requests_that_make_no_sense(folders):
    with pytest.raises(UsageError, match="needs --reference"):
        EvaluateSettings.build({"target": "x", "metric": ("psnr",)})
    with pytest.raises(UsageError, match="made from"):
        EvaluateSettings.build({"target": "x", "reference": folders, "metric": ("do_no_harm",)})
    (folders / "other").mkdir()
    Image.new("RGB", (8, 8)).save(folders / "other" / "z.png")
    with pytest.raises(UsageError, match="counterpart"):
        evaluated(folders, reference=folders / "other")


class Stand:
    """In the place of LPIPS: the mean difference, so that what is passed on can be seen."""

    def __init__(self, device, *, offline):
        assert offline

    def __call__(self, output, target):
        return float((output - target).abs().mean())


def test_lpips_is_measured_when_it_is_named(folders, monkeypatch):
    monkeypatch.setattr(perceptual, "Lpips", Stand)
    monkeypatch.setattr(perceptual, "require_package", lambda: None)
    chosen = {"baseline": str(folders / "photos"), "offline": True}
    result = evaluated(folders, metric=("lpips", "psnr"), **chosen)
    summary = result.summary
    assert 0 < summary["lpips"] < 0.6 * summary["before_lpips"]
    assert [row[0] for row in result.tables[0].rows] == ["PSNR dB", "LPIPS"]
    bounds = {summary["lpips"] + 0.001: 0, summary["lpips"] - 0.001: 5}
    for bound, code in bounds.items():
        assert evaluated(folders, minimum=(f"lpips={bound:.4f}",), **chosen).exit_code == code


def test_lpips_is_left_alone_otherwise(folders, monkeypatch):
    monkeypatch.setattr(perceptual, "Lpips", None)
    monkeypatch.setattr(perceptual, "require_package", None)
    assert "lpips" not in evaluated(folders).summary


def test_without_its_package_lpips_is_missing(folders, monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    for dry_run in (False, True):
        settings = EvaluateSettings(
            target=str(folders / "clean"), reference=folders / "targets", metric=("lpips",)
        )
        with pytest.raises(MissingError, match="package lpips") as caught:
            api.plan(settings) if dry_run else api.evaluate(settings)
        assert (caught.value.exit_code, caught.value.remedy) == (4, "pip install 'qtool[lpips]'")
