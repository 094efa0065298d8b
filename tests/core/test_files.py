"""Files that users hand over, and places to write to: whatever they are, one ValueError names them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparse_prefill.core.files import check_folder, check_output, parse_json, read_json, read_text, read_yaml

NO_TEXT = {
    "latin-1": "schön: 1".encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "binary": bytes(range(256)),
}
NO_JSON = {
    "empty": b"",
    "cut short": b'{"a": [1, 2',
    "a key twice": b'{"a": {"b": 1, "b": 2}}',
    "half a pair": b'{"a": "\\ud83d"}',
    "a number without end": b"[" + b"1" * 5000 + b"]",
    "nested": b"[" * 100_000,
}
NO_YAML = {
    "mis-indented": b"a:\n  b: 1\n c: 2\n",
    "tabs": b"a:\n\t- 1\n",
    "a key twice": b"a: 1\nb:\n  c: 1\n  c: 2\n",
    "a number twice": b"a:\n  1: x\n  01: y\n",
    "no date": b"a: 2024-13-45\n",
    "a tag of code": b"!!python/object/apply:os.getcwd []\n",
    "a tag of another type": b"a: !!timestamp never\n",
    "a key that is a list": b"? [1]\n: 2\n",
    "cut short": b'a: "b',
    "control characters": b"a: \x01\n",
    "a number without end": b"a: " + b"1" * 5000,
}


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
@pytest.mark.parametrize("content", NO_TEXT.values(), ids=NO_TEXT)
def test_other_encodings_are_refused_by_name(read, content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"file is no plan: it isn't text in UTF-8") as error:
        read(tmp_path / "file", "plan")
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    ("read", "content"),
    [*((read_json, one) for one in NO_JSON.values()), *((read_yaml, one) for one in NO_YAML.values())],
    ids=[*(f"json, {name}" for name in NO_JSON), *(f"yaml, {name}" for name in NO_YAML)],
)
def test_broken_files_are_refused_by_name_in_one_line(read, content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"file is no plan: ") as error:
        read(tmp_path / "file", "plan")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, "plan") == read_yaml(path, "plan") == {"a": 1}
    assert read_text(path, "plan") == '{"a": 1}'


def test_valid_files_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_text("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  a: 3\n1: x\nb: null\n")
    assert read_yaml(path, "plan") == {"base": {"a": 1, "b": 2}, "other": {"a": 3, "b": 2}, 1: "x", "b": None}
    assert parse_json('{"a": "\\ud83d\\ude42"}') == {"a": "🙂"}


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
def test_paths_that_arent_files_are_refused_by_name(read, tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "none", "There is no plan at .*none"),
        (tmp_path / "file" / "below", "There is no plan at .*below"),
        (tmp_path, "it is a folder"),
        ("/dev/zero", "it is a device"),
        (tmp_path / ("x" * 300), "can't be read: File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            read(path, "plan")


# Outputs


def test_an_output_is_a_regular_file_or_can_become_one(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, message in (
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "pipe", "is no regular file"),
        ("/dev/null", "is no regular file"),
        ("/dev/full", "is no regular file"),
        (tmp_path / "file" / "below", "file is a file, and no folder"),
        (tmp_path / "file" / "far" / "below", "file is a file, and no folder"),
        (tmp_path / "circle", "can't be written"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(path)
    assert check_output(tmp_path / "new" / "file") == tmp_path / "new" / "file"
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="is what the command reads"):
        check_output(tmp_path / "file", [None, "pydoc", tmp_path / "file"])


def test_links_are_followed_to_the_file_they_lead_to(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("new/file")
    assert check_output(tmp_path / "link") == tmp_path / "file"
    assert check_output(tmp_path / "dangling") == tmp_path / "new" / "file"


def test_a_folder_is_one_or_can_become_one(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is a file"):
            check_folder(path)
    assert check_folder(tmp_path) == tmp_path
    assert check_folder(tmp_path / "new" / "one") == tmp_path / "new" / "one"


@pytest.mark.parametrize("stream", ["/dev/stdout", "/dev/fd/1", "/dev/stderr"])
@pytest.mark.parametrize("to", ["a pipe", "a file"])
def test_the_file_that_a_command_prints_to_is_refused_as_output(stream, to, tmp_path):
    program = "import sys; from sparse_prefill.core.files import check_output\n"
    program += "try: check_output(sys.argv[1])\nexcept ValueError: sys.exit(3)\n"
    with (tmp_path / "printed").open("w") as file:
        printed = subprocess.PIPE if to == "a pipe" else file
        run = subprocess.run([sys.executable, "-c", program, stream], stdout=printed, stderr=printed, timeout=100)
    assert run.returncode == 3
