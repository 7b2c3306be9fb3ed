"""Fixtures that several rooms share: a device, tiny models, folders of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import nn

# Triton reads this when a kernel is defined, so it must be set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The hub's client reads this when it is imported: no test opens a connection.
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile(
    "qtool", deadline=None, derandomize=True, database=None, max_examples=60, print_blob=True
)
settings.load_profile("qtool")

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURES_PER_CLASS = 2
CLASSES = 3


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures and weights, which lie beside the repository on some machines."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real pictures and weights beside the repository")
    return folder


@pytest.fixture(scope="session")
def larger_cpu(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which an x86 CPU with AVX2 has AVX-512 and AMX too, done by loops."""
    from qtool.engine.cpu import build_native, native

    if not native.has_vectors():
        pytest.skip("no AVX2, or the compiled passes were not built here")
    library = tmp_path_factory.mktemp("emulated") / "native.so"
    header = REPOSITORY / "tests/engine/emulated.h"
    flags = ("-include", str(header), "-mavx2", "-mfma", "-Wno-psabi")
    if not build_native.compiled(native.LIBRARY.parent, library, *flags):
        pytest.skip("no C compiler")

    @contextmanager
    def emulated() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "LIBRARY", library)
            native.library.cache_clear()
            assert native.has_tiles()
            assert native.packed_operands() == torch.int8
            yield
        native.library.cache_clear()

    return emulated


@pytest.fixture(scope="session")
def photo_files() -> ModuleType:
    """What makes photographs with awkward traits."""
    from tests import photo_files as made

    return made


@pytest.fixture(autouse=True)
def _own_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test reads or fills the caches and settings of whoever runs it."""
    for name in list(os.environ):
        if name.startswith("QTOOL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def build_model() -> Callable[..., nn.Module]:
    """Build a timm model with random weights, the same ones every time."""

    def build_seeded(architecture: str, **model_args: object) -> nn.Module:
        from qtool.models.vision import build

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(architecture, model_args, device="cpu").eval()

    return build_seeded


@pytest.fixture
def trained_norms() -> Callable[[nn.Module], nn.Module]:
    """Give BatchNorms the statistics, gains and shifts of a network that has seen something."""

    def train(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0.0, 0.2, generator=generator)
                    module.running_var.uniform_(0.5, 1.5, generator=generator)
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0.0, 0.2, generator=generator)
        return model

    return train


CONVOLUTIONAL = {
    "resnet": ("test_resnet", {"num_classes": 10}),
    "mobilenet": ("test_efficientnet", {"num_classes": 10, "act_layer": "relu6"}),
    "convnext": (
        "convnext_tiny",
        {"num_classes": 10, "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    ),
}


@pytest.fixture(scope="session")
def convolutional_families() -> dict[str, tuple[str, dict[str, object]]]:
    """Architecture and arguments of a small network of each convolutional family."""
    return CONVOLUTIONAL


@pytest.fixture
def build_convolutional(
    build_model: Callable[..., nn.Module], trained_norms: Callable[[nn.Module], nn.Module]
) -> Callable[[str], nn.Module]:
    """Build a small ResNet, MobileNet or ConvNeXt of 10 classes, as if it had been trained."""

    def build_trained(family: str) -> nn.Module:
        architecture, model_args = CONVOLUTIONAL[family]
        return trained_norms(build_model(architecture, **model_args)).requires_grad_(False)

    return build_trained


@pytest.fixture
def tiny_vit(build_model: Callable[..., nn.Module]) -> nn.Module:
    """A vision transformer for 32 x 32 pictures: 16 patches, 2 blocks, 2 heads, 10 classes."""
    return build_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
    )


@pytest.fixture
def tiny_swin(build_model: Callable[..., nn.Module]) -> nn.Module:
    """A Swin transformer for 32 x 32 pictures: two stages, windows of 4 x 4, 10 classes."""
    return build_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=10,
    )


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Six pictures in folders named 0, 1 and 2."""
    folder = tmp_path / "classes"
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        for index in range(PICTURES_PER_CLASS):
            _picture(label, index).save(folder / str(label) / f"{index}.png")
    return folder


@pytest.fixture
def labelled_folder(tmp_path: Path) -> Path:
    """Six pictures and a labels.csv with three classes."""
    folder = tmp_path / "labelled"
    folder.mkdir()
    lines = ["file,label"]
    for label in range(CLASSES):
        for index in range(PICTURES_PER_CLASS):
            name = f"{label}_{index}.png"
            _picture(label, index).save(folder / name)
            lines.append(f"{name},{label}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def _picture(label: int, index: int) -> Image.Image:
    """A noisy 40 x 36 picture whose strongest channel is its class."""
    pixels = np.random.default_rng(10 * label + index).integers(0, 120, (36, 40, 3))
    pixels[..., label] += 120
    return Image.fromarray(pixels.astype(np.uint8))
