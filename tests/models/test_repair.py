"""timm works beside a torchvision whose compiled part does not load."""

import subprocess
import sys
import textwrap

# Exactly what a CPU-only torch meets: the extension does not load, so no operator is registered,
# and torchvision's own import fails at the first one that it describes.
BROKEN = """
import importlib.machinery
import torch

finder = importlib.machinery.FileFinder
find = finder.find_spec

def without_extension(self, name, *rest):
    found = find(self, name, *rest)
    return None if found and "torchvision/_C" in str(found.origin) else found

def refuse(path):
    raise OSError("undefined symbol")

finder.find_spec = without_extension
torch.ops.load_library = refuse
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-c", BROKEN + textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_simulated_fault_is_the_real_one():
    result = run("import torchvision")
    assert "operator torchvision::nms does not exist" in result.stderr


def test_models_and_transforms_work_after_the_repair():
    result = run(
        """
        from qtool.models import vision
        import timm
        from torchvision.transforms import v2
        model = vision.build("vit_tiny_patch16_224", {"depth": 1, "img_size": 32})
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 1000)
        assert v2.Resize(8)(torch.rand(3, 16, 16)).shape == (3, 8, 8)
        assert vision.timm is timm
        """
    )
    assert result.returncode == 0, result.stderr


def test_other_failures_are_not_hidden():
    result = run(
        """
        import sys
        from qtool.models import repair
        class Finder:
            def find_spec(self, name, *rest):
                if name == "broken_package":
                    raise RuntimeError("something else")
        sys.meta_path.insert(0, Finder())
        try:
            repair.import_repaired("broken_package")
        except RuntimeError as error:
            sys.exit(str(error) != "something else")
        """
    )
    assert result.returncode == 0, result.stderr
