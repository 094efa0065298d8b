"""A tiny model and a text for tests of commands."""

import pytest
from tiny_gguf import write_gguf

PROSE = "The keeper of the light writes down the wind and the waves each night. " * 60


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return str(write_gguf(path, fields={"llama.context_length": 4096}))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return str(path)
