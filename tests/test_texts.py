"""The text to measure on: read whole, named, hashed; anything else is one clear sentence."""

import hashlib
import io
import sys

import pytest

from manyheads.evaluate import texts


def standard_input(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_without_a_file_it_is_long_english_and_the_same_every_time():
    text = texts.read()
    assert text == texts.read(None) == texts.read([])
    assert "documentation topics" in text.name
    assert len(text.content) > 300_000
    assert text.content.count(" the ") > 3_000
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()


def test_one_file_by_any_kind_of_path(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmaël.\n", encoding="utf-8")
    text = texts.read([path])
    assert (text.name, text.content) == ("book.txt", "Call me Ishmaël.\n")
    # One bare string is one path, not a sequence of one-letter paths.
    assert text == texts.read(str(path)) == texts.read(path) == texts.read([str(path)])


def test_files_are_joined_in_the_order_given(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text(f"text {name}")
    standard_input(monkeypatch, b"typed")
    text = texts.read([tmp_path / "b", "-", tmp_path / "a"])
    assert (text.name, text.content) == ("b + standard input + a", "text b\n\ntyped\n\ntext a")
    assert text.sha256 != texts.read([tmp_path / "a", tmp_path / "b"]).sha256


def test_windows_line_ends_and_byte_order_mark_are_no_part_of_the_text(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts.read([tmp_path / "dos.txt"]).content == "one\ntwo\n"


BAD = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t\n", "is empty"),
    "binary": (b"\x7fELF\x00\x01", "NUL bytes"),
    "utf16": ("text".encode("utf-16"), "NUL bytes|not UTF-8"),
    "latin1": (b"caf\xe9", r"not UTF-8 text \(byte 3 is 0xe9\).*iconv"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_text_is_refused_by_name(kind, tmp_path, monkeypatch):
    data, says = BAD[kind]
    good, bad = tmp_path / "good.txt", tmp_path / f"{kind}.txt"
    good.write_text("fine")
    bad.write_bytes(data)
    with pytest.raises(texts.TextError, match=says) as caught:
        texts.read([good, bad])
    assert f"{kind}.txt" in str(caught.value)
    standard_input(monkeypatch, data)
    with pytest.raises(texts.TextError, match=f"^standard input.*({says})"):
        texts.read(["-"])


def test_what_is_no_file_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(texts.TextError, match=r"no file '.*nowhere\.txt'"):
        texts.read([tmp_path / "nowhere.txt"])
    with pytest.raises(texts.TextError, match="is a folder: name the text files in it"):
        texts.read([tmp_path])
    with pytest.raises(texts.TextError, match="more than once"):
        texts.read(["-", "-"])

    def denied(path):
        raise PermissionError(13, "Permission denied")  # root may read everything, so a file's mode would prove nothing

    (tmp_path / "secret.txt").write_text("x")
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(texts.TextError, match=r"secret\.txt' cannot be read \(Permission denied\)"):
        texts.read([tmp_path / "secret.txt"])


def test_a_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(texts.TextError, match="name a text file"):
        texts.read()
