"""The journal survives being cut off anywhere."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qtool.io.journal import NAME, Journal, Record, read_journal

RECORD = Record(
    output="a/b.jpg",
    input="photos/a/b.jpg",
    input_sha256="1" * 64,
    settings_sha256="2" * 64,
    output_sha256="3" * 64,
    status="ok",
    time="2024-01-01T00:00:00+00:00",
)


def test_the_last_record_of_a_result_counts(tmp_path):
    journal = Journal(tmp_path)
    journal.add(RECORD)
    journal.add(replace(RECORD, output="c.jpg"))
    journal.add(replace(RECORD, status="copied"))
    found = read_journal(tmp_path)
    assert found == {
        "a/b.jpg": replace(RECORD, status="copied"),
        "c.jpg": replace(RECORD, output="c.jpg"),
    }
    assert read_journal(tmp_path / "none") == {}


@given(st.integers(0, 400))
def test_a_cut_line_costs_one_record(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    journal.add(RECORD)
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole + whole[: cut % len(whole)])
    assert read_journal(folder) == {"a/b.jpg": RECORD}
    journal.add(replace(RECORD, output="next.jpg"))
    assert read_journal(folder).keys() == {"a/b.jpg", "next.jpg"}


@given(st.text(max_size=60))
def test_foreign_lines_are_passed_over(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("journal")
    (folder / NAME).write_text(text + "\n{}\n[1]\n", encoding="utf-8", errors="replace")
    assert read_journal(folder) == {}
