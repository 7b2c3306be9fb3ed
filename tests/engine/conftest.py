"""What the engine's tests share: seeded codes and parameters, and the backends to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from qtool.engine import dispatch
from qtool.engine.cpu import exact


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch) -> None:
    """Each test starts with the default backend and no decisions."""
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.setattr(dispatch, "_decisions", {})


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Each test may change the number of threads, on which later sums would depend."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cpu_runs(op: str) -> bool:
    """Whether this CPU takes exact int8 products, or `op` needs none."""
    return op not in dispatch.INTEGER_PRODUCTS or exact.int8_product_is_exact()


class Draw:
    """Random arguments on the device of the tests, from one seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def codes(self, *shape: int, bits: int = 8) -> torch.Tensor:
        codes = torch.randint(0, 2**bits, shape, generator=self._generator)
        return codes.to(torch.uint8).to(self.device)

    def zeros(self, *shape: int, bits: int = 8) -> torch.Tensor:
        return self.codes(*shape, bits=bits).int()

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def scales(self, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self._generator) + 0.01).to(self.device)


@pytest.fixture
def exact_int8_products() -> None:
    """For tests of the CPU's own integer products."""
    if not exact.int8_product_is_exact():
        pytest.skip("this CPU's int8 products saturate")


@pytest.fixture(params=[0, 1], ids=["seed0", "seed1"])
def draw(request, device) -> Draw:
    return Draw(device, request.param)


@pytest.fixture
def fast_backends(device) -> list[str]:
    """The backends that must agree with the reference on this device."""
    return ["triton"] if device.type == "cuda" else ["cpu", "triton"]


@pytest.fixture
def outputs(fast_backends) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Run a call on the reference and on every fast backend, and return all results.

    Freed memory is filled with a pattern first, so that an element a kernel forgets to write shows.
    """

    def run(call, *args, **options):
        with dispatch.use_backend("reference"):
            expected = call(*args, **options)
        results = {}
        for backend in fast_backends:
            if backend == "cpu" and not cpu_runs(call.__name__):
                continue
            poison = torch.full_like(expected, 77)
            del poison
            with dispatch.use_backend(backend), dispatch.trace() as decisions:
                results[backend] = call(*args, **options)
            assert [decision.backend for decision in decisions] == [backend]
        return expected, results

    return run


@pytest.fixture
def assert_equal_everywhere(outputs) -> Callable[..., torch.Tensor]:
    """Demand that every fast backend returns the bits of the reference; returns them."""

    def check(call, *args, **options):
        expected, results = outputs(call, *args, **options)
        for backend, result in results.items():
            assert result.dtype == expected.dtype, backend
            assert result.is_contiguous(), backend
            assert torch.equal(result, expected), backend
        return expected

    return check


@pytest.fixture
def assert_equal_up_to_ties(outputs) -> Callable[..., torch.Tensor]:
    """Demand the codes of the reference, from Triton but for values next to a tie; returns them.

    Uniform codes next to a tie may differ by one. A table has levels any distance apart.
    """

    def check(call, *args, uniform=True, **options):
        expected, results = outputs(call, *args, **options)
        for backend, result in results.items():
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype), backend
            assert result.is_contiguous(), backend
            if backend != "triton":
                assert torch.equal(result, expected), backend
                continue
            distance = (result.int() - expected.int()).abs()
            assert int(distance.count_nonzero()) <= 0.01 * distance.numel()
            assert not uniform or not distance.numel() or int(distance.max()) <= 1
        return expected

    return check
