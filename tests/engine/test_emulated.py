"""The passes for AVX-512 and AMX on other CPUs: the same tests, instructions done by loops."""

from __future__ import annotations

import pytest

from tests.engine.test_backends import (  # noqa: F401  (collected here once more)
    test_attention,
    test_attention_leaves_out_keys_that_a_map_hides,
    test_attention_on_the_tokens_of_a_picture,
    test_conv2d_quantize,
    test_layer_norm_quantize,
    test_linear_quantize,
)
from tests.engine.test_cpu import (  # noqa: F401
    test_codes_after_an_activation,
    test_codes_are_written_into_parts_of_other_tensors,
    test_layers_to_codes_are_exact_on_every_machine,
    test_one_pass_gives_the_codes_of_several,
    test_one_pass_rounds_ties_as_the_division_does,
    test_one_pass_takes_any_float,
)
from tests.engine.test_panels import *  # noqa: F403


@pytest.fixture(scope="module", autouse=True)
def _every_instruction(larger_cpu):
    with larger_cpu():
        yield


@pytest.fixture
def fast_backends():
    """Nothing of the others is emulated."""
    return ["cpu"]
