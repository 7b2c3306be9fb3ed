"""Every kind of error has an exit code of its own, and the overview tells the truth."""

import re

import pytest

from qtool import errors

CODES = {
    "QtoolError": 1,
    "CheckpointError": 1,
    "MissingCheckpointError": 4,
    "ImageError": 1,
    "UsageError": 2,
    "OutputExistsError": 2,
    "ItemsFailedError": 3,
    "MissingError": 4,
    "BackendError": 4,
    "QualityGateError": 5,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes(name, code):
    assert getattr(errors, name).exit_code == code


def test_the_overview_lists_every_kind():
    rows = re.findall(r"(\w+Error) +(\d+)", errors.__doc__)
    assert {name: int(code) for name, code in rows} == CODES
    kinds = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)}
    assert kinds - {"Progress", "Protocol"} == set(CODES)
