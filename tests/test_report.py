"""Results as JSON, Markdown and HTML."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.report import Picture, Result, Table, cell

HOSTILE = '<script>alert("x")</script> | `a` *b* \x1b[31m'


@pytest.fixture
def result():
    return Result(
        "eval",
        "partial",
        items=[
            {"path": Path("a.png"), "status": "ok", "label": 3},
            {"path": HOSTILE, "status": "failed", "error": "not a picture"},
        ],
        summary={"top1": 75.125, "lost": float("nan"), "data": {"pictures": 2, "seeds": (1, 2)}},
        tables=[Table(HOSTILE, ["name", "top1"], [["float", 75.125], [HOSTILE, None]])],
        pictures=[Picture(HOSTILE, b"\x89PNG")],
    )


def test_json_has_the_same_five_keys(result):
    content = json.loads(result.to_json())
    assert list(content) == ["schema", "command", "status", "items", "summary"]
    assert content["schema"] == 1
    assert content["items"][0]["path"] == "a.png"
    assert content["summary"] == {
        "top1": 75.125,
        "lost": None,
        "data": {"pictures": 2, "seeds": [1, 2]},
    }


def test_json_holds_names_that_are_not_unicode():
    text = Result("info", items=[{"path": "caf\udce9.png"}]).to_json()
    assert text.isascii()
    assert json.loads(text)["items"][0]["path"] == "caf\udce9.png"


@pytest.mark.parametrize(
    ("status", "summary", "code"),
    [
        ("ok", {}, 0),
        ("planned", {}, 0),
        ("partial", {}, 3),
        ("failed", {}, 1),
        ("failed", {"exit_code": 5}, 5),
    ],
)
def test_exit_codes(status, summary, code):
    assert Result("eval", status, summary=summary).exit_code == code


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (12, "12"),
        (0.123456, "0.1235"),
        (123456.7, "123457"),
        (float("nan"), "nan"),
        (Path("a/b"), "a/b"),
        (["a", 1], "a, 1"),
        ({"a": 1.5}, "a: 1.5"),
    ],
)
def test_cells(value, text):
    assert cell(value) == text


def test_facts_are_flat(result):
    assert ("data.pictures", "2") in result.facts


def test_markdown_tables_keep_their_columns(result):
    lines = result.to_markdown().splitlines()
    for block in "\n".join(lines).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1
    assert not any("<script" in re.sub(r"\\<", "", line) for line in lines)


class Page(HTMLParser):
    """Collect tags, their attributes and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_one_file_that_escapes_everything(result):
    page = Page()
    page.feed(result.to_html())
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "a", "iframe"} & set(names)
    assert names.count("table") == 3
    assert [attrs["src"] for tag, attrs in page.tags if tag == "img"] == [
        "data:image/png;base64,iVBORw=="
    ]
    assert HOSTILE in page.text


def test_html_fits_phones_and_dark_rooms(result):
    text = result.to_html()
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count('<div class="scroll"') == text.count("<table>")
    assert not re.search(r"https?:|@import|url\(", text)


def test_reports_are_chosen_by_suffix(result):
    assert result.to_text(".JSON") == result.to_json()
    assert result.to_text(".md") == result.to_markdown()
    assert result.to_text(".html") == result.to_html()
    with pytest.raises(UsageError, match=r"\.pdf"):
        result.to_text(".pdf")


def test_an_empty_result_makes_all_reports():
    for suffix in (".json", ".md", ".html"):
        assert "models" in Result("models").to_text(suffix)
