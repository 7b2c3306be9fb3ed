"""What can be wrong with the tensors of a switchable layer, each in one line."""

import pytest
import torch

from qtool.io import nested_tensors as nested

WEIGHTS, ACTIVATION = (2, 4, 8), (4, 8)


def layer(planes=4, *, table=False):
    own = {f"p{n + 1}": torch.zeros(6, 3, dtype=torch.uint8) for n in range(planes)}
    own |= {
        "alpha": torch.ones(3, 6, dtype=torch.float16),
        "delta": torch.zeros(3, 6, dtype=torch.float16),
        "act": torch.tensor([[0.1, 3.0], [0.01, 128.0]]),
    }
    if table:
        own["act_table"] = torch.zeros(nested.table_bytes(ACTIVATION), dtype=torch.uint8)
    return own


def problem(own, *, planes=4, table=False, dedicated=False):
    return nested.layer_problem(
        own, WEIGHTS, ACTIVATION, planes=planes, table=table, dedicated=dedicated
    )


def test_planes_and_bits():
    assert [nested.planes_for(bits) for bits in range(2, 9)] == [1, 2, 2, 3, 3, 4, 4]
    assert [nested.planes_for(bits, dedicated=True) for bits in range(2, 9)] == [
        0,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert [nested.bits_of(planes) for planes in range(1, 5)] == [2, 4, 6, 8]
    assert [nested.plane_of(leaf) for leaf in ("p1", "p4", "p5", "p0", "p12", "q1")] == [
        1, 4, 0, 0, 0, 0,
    ]  # fmt: skip
    assert nested.table_bytes((4, 6, 8), operands=2) == 2 * (32 + 16 + 32 + 64)


@pytest.mark.parametrize("planes", [1, 2, 4])
@pytest.mark.parametrize("table", [False, True])
def test_whole_layers_have_no_problem(planes, table):
    assert problem(layer(planes, table=table), planes=planes, table=table) == ""


@pytest.mark.parametrize("planes", [0, 2, 4])
def test_own_codes_of_two_bits_are_there_if_they_should_be(planes):
    codes = {"d2": torch.zeros(6, 3, dtype=torch.uint8)}
    assert problem(layer(planes) | codes, planes=planes, dedicated=True) == ""
    assert "it has the tensors" in problem(layer(planes), planes=planes, dedicated=True)
    odd = {"d2": torch.zeros(6, 3)}
    assert "d2 is float32" in problem(layer(planes) | odd, planes=planes, dedicated=True)
    assert "it has the tensors" in problem(layer(4) | codes)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("p2", torch.zeros(6, 3), "p2 is float32"),
        ("p2", torch.zeros(6, 4, dtype=torch.uint8), "p2 is uint8 (6, 4)"),
        ("p1", torch.zeros(6, dtype=torch.uint8), "p1 is uint8 (6,)"),
        ("alpha", torch.ones(3, 6), "alpha is float32"),
        ("alpha", -torch.ones(3, 6, dtype=torch.float16), "alpha is not finite"),
        ("delta", torch.full((3, 6), torch.inf, dtype=torch.float16), "delta is not finite"),
        ("delta", torch.zeros(2, 6, dtype=torch.float16), "delta is float16 (2, 6)"),
        ("act", torch.ones(2, 3), "act is float32 (2, 3)"),
        ("act", torch.tensor([[0.0, 3.0], [0.1, 1.0]]), "a scale in act"),
        ("act", torch.tensor([[torch.nan, 3.0], [0.1, 1.0]]), "a scale in act"),
        ("act", torch.tensor([[0.1, 0.5], [0.1, 1.0]]), "a zero point in act"),
        ("act", torch.tensor([[0.1, 256.0], [0.1, 1.0]]), "a zero point in act"),
    ],
)
def test_damage_is_named(name, value, words):
    assert words in problem(layer() | {name: value})


def test_tensors_that_are_missing_or_too_many_are_named():
    own = layer()
    del own["delta"]
    assert "alpha, p1" in problem(own)
    assert "extra" in problem(layer() | {"extra": torch.zeros(1)})
    assert problem(layer(2), planes=4) != ""
    assert "act_table" in problem(layer(), table=True)


def test_a_table_with_too_many_levels_or_bytes_is_named():
    own = layer(table=True)
    own["act_table"][:32] = 255
    assert problem(own, table=True) == "a table of 4 bits has 257 levels"
    own["act_table"] = own["act_table"][:-1]
    assert "act_table is uint8 (47,)" in problem(own, table=True)


def test_products_have_four_operands():
    own = {"act": torch.tensor([0.1, 3.0]).expand(2, 4, 2).contiguous()}
    assert nested.products_problem(own, ACTIVATION, table=False) == ""
    assert "act is float32 (2, 2)" in nested.products_problem(
        {"act": own["act"][:, 0]}, ACTIVATION, table=False
    )
    table = torch.zeros(nested.table_bytes(ACTIVATION, 4), dtype=torch.uint8)
    assert nested.products_problem(own | {"act_table": table}, ACTIVATION, table=True) == ""
    assert "not 'act, act_table'" in nested.products_problem(own, ACTIVATION, table=True)
