from __future__ import annotations

import errno
import tempfile

import pytest

from qtool.errors import OutputExistsError, QtoolError, UsageError
from qtool.io.folders import check_files, check_output, find_images, read_labelled


def _touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def _names(folder, paths):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_natural_order_any_case_and_nothing_hidden(tmp_path):
    _touch(
        tmp_path,
        *("10.png", "2.PNG", "b.Jpeg", "A.jpg", ".hidden.png", "notes.txt", "labels.csv"),
        *("sub2/1.webp", "sub10/1.webp", ".thumbnails/1.png"),
    )
    assert _names(tmp_path, find_images(tmp_path)) == [
        "2.PNG",
        "10.png",
        "A.jpg",
        "b.Jpeg",
        "sub2/1.webp",
        "sub10/1.webp",
    ]


def test_links_are_followed_and_loops_end(tmp_path):
    _touch(tmp_path, "real/1.png", "pictures/2.png")
    (tmp_path / "pictures" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "pictures" / "loop").symlink_to(tmp_path / "pictures")
    found = find_images(tmp_path / "pictures")
    assert _names(tmp_path / "pictures", found) == ["2.png", "linked/1.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "does not exist"), ("file.png", "is not a folder"), ("empty", "has no pictures")],
)
def test_unusable_folder(tmp_path, name, message):
    _touch(tmp_path, "file.png", "empty/notes.txt")
    for read in (find_images, lambda folder: read_labelled(folder, num_classes=3)):
        with pytest.raises(UsageError, match=message) as caught:
            read(tmp_path / name)
        assert caught.value.remedy


def test_labels_csv(labelled_folder):
    pictures = read_labelled(labelled_folder, num_classes=3)
    assert _names(labelled_folder, [path for path, _ in pictures])[:3] == [
        "0_0.png",
        "0_1.png",
        "1_0.png",
    ]
    assert [label for _, label in pictures] == [0, 0, 1, 1, 2, 2]


def test_labels_csv_with_byte_order_mark_sub_folders_and_more_columns(tmp_path):
    _touch(tmp_path, "images/a, b.png")
    table = 'author,label,file\n"Ä, B",7,"images/a, b.png"\n'
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8-sig")
    assert read_labelled(tmp_path, num_classes=10) == [(tmp_path / "images" / "a, b.png", 7)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "no column file and no column label"),
        ("file,class\na.png,1\n", "no column label"),
        ("file,label\n", "lists no pictures"),
        ("file,label\na.png,3\n", r"line 2: label '3' is not in 0\.\.2"),
        ("file,label\na.png,-1\n", "label '-1'"),
        ("file,label\na.png,cat\n", "label 'cat'"),
        ("file,label\na.png\n", "label ''"),
        ("file,label\na.png,1\nb.png,1\n", "line 3: 'b.png' does not exist"),
        ("file,label\na.png,1\na.png,2\n", "line 3: 'a.png' is listed twice"),
        ("file,label\n../a.png,1\n", "not a path inside"),
        ("file,label\nsub/../../a.png,1\n", "not a path inside"),
        ("file,label\n..\\a.png,1\n", "not a path inside"),
        ("file,label\nC:\\a.png,1\n", "not a path inside"),
        ("file,label\n/etc/passwd,1\n", "not a path inside"),
        (f"file,label\n{'n' * 5000}.png,1\n", "does not exist"),
        (",1\n", "no column"),
    ],
)
def test_wrong_labels_csv(tmp_path, table, message):
    _touch(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(UsageError, match=message) as caught:
        read_labelled(tmp_path, num_classes=3)
    assert caught.value.remedy


def test_labels_csv_that_is_no_text(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe\x00,1\n")
    with pytest.raises(UsageError, match="not a CSV file"):
        read_labelled(tmp_path, num_classes=3)


def test_class_folders_by_number(class_folders):
    (class_folders / "2").rename(class_folders / "007")
    pictures = read_labelled(class_folders, num_classes=10)
    assert [label for _, label in pictures] == [0, 0, 1, 1, 7, 7]


def test_class_folders_by_wordnet_id(tmp_path):
    _touch(tmp_path, "n02/a.png", "n01/10.png", "n01/9.png", ".git/a.png")
    pictures = read_labelled(tmp_path, num_classes=3, wnids=["n00", "n02", "n01"])
    assert _names(tmp_path, [path for path, _ in pictures]) == [
        "n02/a.png",
        "n01/9.png",
        "n01/10.png",
    ]
    assert [label for _, label in pictures] == [1, 2, 2]


def test_class_folders_by_name(tmp_path):
    _touch(tmp_path, "cat/1.png", "dog/1.png", "ant/1.png")
    pictures = read_labelled(tmp_path, num_classes=3)
    assert {path.parent.name: label for path, label in pictures} == {"ant": 0, "cat": 1, "dog": 2}
    with pytest.raises(UsageError, match="3 class folders with names, the model has 1000 classes"):
        read_labelled(tmp_path, num_classes=1000)


def test_class_folders_out_of_range_or_twice(tmp_path):
    _touch(tmp_path, "0/1.png", "5/1.png")
    with pytest.raises(UsageError, match=r"5 is not in 0\.\.2"):
        read_labelled(tmp_path, num_classes=3)
    _touch(tmp_path, "05/1.png")
    with pytest.raises(UsageError, match="same number"):
        read_labelled(tmp_path, num_classes=10)


def test_pictures_without_labels(tmp_path):
    with pytest.raises(UsageError, match="no labels") as caught:
        read_labelled(_touch(tmp_path, "a.png"), num_classes=3)
    assert "labels.csv" in caught.value.remedy


def test_output_that_is_free(tmp_path):
    assert check_output(tmp_path / "deep" / "er" / "file.bin")
    assert check_output(tmp_path / "new", folder=True)
    assert check_output(_touch(tmp_path / "empty", ".hidden"), folder=True)
    assert not (tmp_path / "deep").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", [False, True])
def test_output_that_exists(tmp_path, folder):
    path = _touch(tmp_path / "out", "1.png") if folder else tmp_path / "out"
    if not folder:
        path.write_bytes(b"")
    with pytest.raises(OutputExistsError) as caught:
        check_output(path, folder=folder)
    assert "--overwrite" in caught.value.remedy
    assert "--skip-existing" in caught.value.remedy
    assert check_output(path, overwrite=True, folder=folder)
    assert not check_output(path, skip_existing=True, folder=folder)


def test_output_of_the_wrong_kind(tmp_path):
    _touch(tmp_path, "file")
    with pytest.raises(UsageError, match="is a folder; a file is needed"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="is a file; a folder is needed"):
        check_output(tmp_path / "file", overwrite=True, folder=True)
    with pytest.raises(UsageError, match="is not a folder"):
        check_output(tmp_path / "file" / "below")


def test_output_in_a_place_without_permission(tmp_path, monkeypatch):
    def refuse(**_options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(QtoolError, match="Permission denied") as caught:
        check_output(tmp_path / "deep" / "file.bin")
    assert caught.value.exit_code == 1


def test_files_that_belong_together_are_there_or_not(tmp_path):
    names = ("a", "b")
    assert check_files(tmp_path / "new", names)
    assert not (tmp_path / "new").exists()
    _touch(tmp_path, "other")
    assert check_files(tmp_path, names, skip_existing=True)
    _touch(tmp_path, "b")
    with pytest.raises(OutputExistsError, match="b exists already"):
        check_files(tmp_path, names)
    with pytest.raises(OutputExistsError, match="has a b but no a") as caught:
        check_files(tmp_path, names, skip_existing=True)
    assert "--overwrite" in caught.value.remedy
    assert check_files(tmp_path, names, overwrite=True)
    _touch(tmp_path, "a")
    assert not check_files(tmp_path, names, skip_existing=True)
    with pytest.raises(UsageError, match="is a file; a folder is needed"):
        check_files(tmp_path / "a", names, overwrite=True)
