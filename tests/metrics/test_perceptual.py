"""LPIPS: equal pictures give 0, nearer ones less; what is missing is said, never replaced."""

import io
import urllib.error

import pytest
import torch

from qtool.errors import MissingError
from qtool.metrics import perceptual

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of torch; where the weights would lie."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="module")
def trunk():
    """Random weights of AlexNet, under torchvision's names."""
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    state = perceptual._network().net.state_dict()
    return {f"features.{name.partition('.')[2]}": tensor for name, tensor in state.items()}


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 64, 48, generator=generator)
    noise = torch.randn(3, 64, 48, generator=generator)
    return target, target + 0.02 * noise, target + 0.2 * noise


def refuse(*_, **__):
    raise AssertionError("a connection was opened")


def test_equal_pictures_are_nearest(trunk, pictures, cache, monkeypatch):
    monkeypatch.setattr(perceptual.urllib.request, "urlopen", refuse)
    cache.parent.mkdir(parents=True)
    torch.save({**trunk, "classifier.6.bias": torch.zeros(3)}, cache)
    measure = perceptual.Lpips(CPU, offline=False)
    target, near, far = pictures
    assert measure(target, target) == 0.0
    assert 0 < measure(near, target) < measure(far, target)
    assert measure(near, target) == measure(near.double(), target.double())
    # Values outside 0..1 are clamped; the package does the rest.
    network = perceptual._network()
    slices = network.net.state_dict()
    network.net.load_state_dict({k: trunk[f"features.{k.partition('.')[2]}"] for k in slices})
    with torch.no_grad():
        expected = network(far.clamp(0, 1)[None], target[None], normalize=True)
    assert measure(far, target) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="31 x 31"):
        measure(target[:, :30], target[:, :30])
    assert measure(target[:, :31, :31], near[:, :31, :31]) > 0
    with pytest.raises(ValueError, match="disagree"):
        measure(target[:, :40], target)


@pytest.mark.parametrize("online", [False, True])
def test_absent_weights_are_missing(trunk, cache, monkeypatch, online):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0" if online else "1")
    monkeypatch.setattr(perceptual.urllib.request, "urlopen", unreachable if online else refuse)
    with pytest.raises(MissingError, match="no route" if online else "offline") as caught:
        perceptual.Lpips(CPU, offline=False)
    assert caught.value.exit_code == 4
    assert str(cache) in caught.value.remedy
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"no weights", "other"])
def test_damaged_weights_are_missing(trunk, cache, content):
    cache.parent.mkdir(parents=True)
    if content == "other":
        buffer = io.BytesIO()
        torch.save({"features.0.weight": trunk["features.0.weight"]}, buffer)
        content = buffer.getvalue()
    cache.write_bytes(content)
    with pytest.raises(MissingError, match=r"damaged|holds no features"):
        perceptual.Lpips(CPU, offline=True)


def test_weights_are_fetched_once(trunk, cache, monkeypatch, pictures):
    fetched = []

    def download(url, path, hash_prefix, progress):
        assert url == perceptual.WEIGHTS_URL
        assert hash_prefix == "7be5be79"
        torch.save(trunk, path)
        fetched.append(url)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(perceptual.urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    target, near, _ = pictures
    found = {perceptual.Lpips(CPU, offline=False)(near, target) for _ in range(2)}
    assert len(found) == len(fetched) == 1


def test_without_the_package_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="not installed") as caught:
        perceptual.Lpips(CPU, offline=True)
    assert caught.value.remedy == "pip install 'qtool[lpips]'"
