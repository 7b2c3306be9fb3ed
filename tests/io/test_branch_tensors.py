"""The tensors of a network of branches, and what can be wrong with them, each in one line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qtool.engine.packing import packed_width
from qtool.io import branch_tensors as branches
from qtool.io.branch_tensors import BranchTable, BranchWidth

ROWS, COLUMNS, NARROW = 6, 10, 4


def table(**changes):
    values = {
        "weight_bits": [2, 2, 2],
        "widths": [
            BranchWidth(bits=2, branches=[1]),
            BranchWidth(bits=3, branches=[1, 2], narrow=2),
            BranchWidth(bits=6, branches=[1, 2, 3]),
        ],
    }
    return BranchTable(**(values | changes))


def unit(there=3):
    own = {f"p{n + 1}": torch.zeros(ROWS, 3, dtype=torch.uint8) for n in range(there)}
    rows = 5 * ROWS + NARROW
    return own | {"alpha": torch.ones(rows), "delta": torch.zeros(rows), "act": torch.ones(6)}


def problem(own, there=3):
    return branches.unit_problem(
        own, table(), rows=ROWS, columns=COLUMNS, narrow_rows=NARROW, branches=there
    )


def test_members_stand_in_the_order_of_the_widths():
    assert table().members() == [
        (2, 1, False), (3, 1, False), (3, 2, True), (6, 1, False), (6, 2, False), (6, 3, False),
    ]  # fmt: skip
    spans = branches.first_rows(table(), ROWS, NARROW)
    assert spans[:4] == [(0, 6), (6, 12), (12, 16), (16, 22)]
    assert spans[-1][1] == 5 * ROWS + NARROW


def test_widths_need_all_their_branches():
    assert [table().there(count) for count in range(4)] == [[], [2], [2, 3], [2, 3, 6]]


def test_planes_are_told_by_their_names():
    names = ("p1", "p8", "p9", "p0", "p11", "alpha")
    assert [branches.plane_of(name) for name in names] == [1, 8, 0, 0, 0, 0]


@given(st.integers(1, 300), st.integers(2, 8))
def test_rows_have_the_bytes_of_the_engine(columns, bits):
    assert branches.row_bytes(columns, bits) == packed_width(bits, columns)


@pytest.mark.parametrize("there", [1, 2, 3])
def test_whole_units_have_no_problem(there):
    assert problem(unit(there), there) == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("p2", torch.zeros(ROWS, 3), "p2 is float32"),
        ("p3", torch.zeros(ROWS, 2, dtype=torch.uint8), "p3 is uint8 (6, 2)"),
        ("alpha", torch.ones(7), "alpha is float32 (7,), not float32 (34,)"),
        ("delta", torch.zeros(34).half(), "delta is float16"),
        ("delta", torch.full((34,), torch.nan), "delta is not finite"),
        ("act", torch.zeros(6), "act is not finite and, for act, positive"),
        ("bias", torch.zeros(6), "it has the tensors"),
    ],
)
def test_damage_is_named(name, value, words):
    assert words in problem(unit() | {name: value})


def test_missing_tensors_are_named():
    own = unit()
    del own["act"]
    assert "it has the tensors" in problem(own)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_bits": []},
        {"weight_bits": [2, 9, 2]},
        {"weight_bits": [2, 2]},
        {"widths": []},
        {"widths": [BranchWidth(bits=3, branches=[1]), BranchWidth(bits=2, branches=[1])]},
        {"widths": [BranchWidth(bits=3, branches=[1]), BranchWidth(bits=3, branches=[2])]},
    ],
)
def test_tables_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValidationError):
        table(**changes)


@pytest.mark.parametrize("values", [{"branches": [1, 1]}, {"branches": [1], "narrow": 2}])
def test_widths_that_make_no_sense_are_refused(values):
    with pytest.raises(ValidationError):
        BranchWidth(bits=4, **values)


def test_sizes_in_the_header_are_checked():
    sizes = dict.fromkeys(branches.SIZES, 3)
    assert branches.sizes_problem(sizes) == ""
    assert branches.sizes_problem(sizes | {"rows": 0}) == "rows is '0', not a size"
    assert branches.sizes_problem(sizes | {"columns": True}) == "columns is 'True', not a size"
    assert "narrow_rows" in branches.sizes_problem({"rows": 3, "columns": 9})
    assert branches.size_of(sizes, "rows") == 3
    with pytest.raises(ValueError, match="no height"):
        branches.size_of(sizes, "height")
