"""Reading of files that users give, and checks of paths that commands write to. Errors name the file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


def read_text(path: str | Path, kind: str) -> str:
    """The text of a file, without a byte order mark.

    Args:
        path (str | Path): the file.
        kind (str): the expected content, for messages, such as "plan".

    Raises:
        ValueError: if there is no such file, it can't be read, or it isn't text in UTF-8.
    """
    path = Path(path)
    try:
        if path.is_char_device() or path.is_block_device():  # reading some of them never ends
            raise ValueError(f"{path} is no {kind}: it is a device.")
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"There is no {kind} at {path}.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is no {kind}: it is a folder.") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {kind}: it isn't text in UTF-8 (byte {error.start}).") from None


def read_json(path: str | Path, kind: str) -> Any:
    """The content of a JSON file. Args and errors as for :func:`read_text` and :func:`parse_json`."""
    text = read_text(path, kind)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no {kind}: {error}") from None


def parse_json(text: str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: if it isn't JSON, gives a key twice, or holds half of a surrogate pair, which UTF-8 can't encode.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("its JSON is nested too deeply.") from None
    except UnicodeEncodeError:
        raise ValueError("its JSON holds half of a surrogate pair, as in \\ud800, which is no character.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it isn't JSON ({error}).") from None
    return content


def with_numbers(content: Any) -> Any:
    """JSON content with keys such as "3" as whole numbers: JSON writes indices of layers and heads as text."""
    if isinstance(content, dict):
        return {int(key) if key.isdecimal() else key: with_numbers(one) for key, one in content.items()}
    return [with_numbers(one) for one in content] if isinstance(content, list) else content


def read_yaml(path: str | Path, kind: str) -> Any:
    """The content of a YAML file. Needs the ``yaml`` extra.

    Args:
        path (str | Path): the file.
        kind (str): the expected content, for messages.

    Raises:
        ValueError: as for :func:`read_text`, or if it isn't YAML or gives a key twice.
    """
    import yaml

    text = read_text(path, kind)
    try:
        return yaml.load(text, Loader=_loader())
    except Exception as error:  # constructors of dates and tagged values raise whatever Python does
        raise ValueError(f"{path} is no {kind}: it isn't YAML ({' '.join(str(error).split())}).") from None


def check_output(path: str | Path, inputs: Sequence[str | Path | None] = ()) -> Path:
    """The path that a command will write to, with links resolved. Commands check it before they compute anything.

    Args:
        path (str | Path): the file.
        inputs (Sequence[str | Path | None]): files that the command reads, which it must not overwrite. Default: none.

    Returns:
        Path: the resolved path of the file, which may not exist yet.

    Raises:
        ValueError: if it is a folder, a device, a pipe or what the command prints to, is one of the inputs, or can't
            be written there.
    """
    path = Path(path)
    try:
        found = path.stat()
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file to write to.")
        if not path.is_file():
            raise ValueError(f"{path} is no regular file, and can't be written to: name another one.")
        if any(os.path.samestat(found, other) for other in _standard_streams()):
            raise ValueError(f"{path} is where the command prints to: name another file.")
        if any(one is not None and os.path.exists(one) and path.samefile(one) for one in inputs):
            raise ValueError(f"{path} is what the command reads: name another file to write to.")
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path} can't be overwritten: you have no permission to.")
        return path.resolve()
    except (FileNotFoundError, NotADirectoryError):
        return _creatable(path)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}.") from None


def check_folder(path: str | Path) -> Path:
    """The folder that a command will write into, which may not exist yet; ValueError if it can't be a folder."""
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a folder to write into.")
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}.") from None
    return _creatable(path / "file").parent


def _creatable(path: Path) -> Path:
    """The resolved path of a file that doesn't exist yet; ValueError if it can't be created there."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):  # links in a circle, which Python before 3.13 calls a RuntimeError
        raise ValueError(f"{path} can't be written: its links lead in a circle.") from None
    folder = next(folder for folder in resolved.parents if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} can't be written: {folder} is a file, and no folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} can't be written: you have no permission to write into {folder}.")
    return resolved


def _standard_streams() -> list[os.stat_result]:
    found = []
    for stream in (sys.stdout, sys.stderr):
        try:
            found.append(os.fstat(stream.fileno()))
        except (AttributeError, OSError, ValueError):  # closed, or not a file, as in a notebook
            continue
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it gives the key {next(key for key in keys if keys.count(key) > 1)!r} twice.")
    return content


@cache
def _loader() -> type:
    """yaml's safe loader, but it refuses a key that is given twice instead of taking the last one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: str | None) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    value = self.construct_object(key)  # 1 and 01 are one key
                    if value in seen:
                        raise ValueError(f"the key {value!r} is given twice, line {key.start_mark.line + 1}")
                    seen.add(value)
            return node

    return Loader
