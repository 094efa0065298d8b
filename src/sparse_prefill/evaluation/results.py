"""Results on disk: written after each step, and gone on with by a second run."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparse_prefill.core.files import check_output, read_json

NUMBERS = re.compile(r"\[\s+(-?\d[^\[\]{}\"]*?)\s+\]")  # a list of numbers that json.dumps spread over lines
FLAT = re.compile(r"\{\s+([^\[\]{}]*?)\s+\}")  # a mapping of nothing nested
CPU_INFO = Path("/proc/cpuinfo")


class Results:
    """A report that is a JSON file at all times.

    Args:
        path (str | Path): the file. If it holds results of the same settings, they are kept; if they are of others,
            nothing is overwritten. Settings that it doesn't tell are added. A link is followed.
        settings (Mapping[str, Any]): what the numbers depend on, as plain numbers, strings, lists and dicts.
        about (Mapping[str, Any]): what a reader should know besides: the command, the machine.

    Attributes:
        content (dict[str, Any]): the report: about, settings, and "rows" with a "name" each.

    Raises:
        ValueError: if the file holds results of other settings, or something else, or it can't be written.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._file = check_output(path)
        settings = json.loads(json.dumps(settings))  # as it will be read
        if self.path.exists():
            self.content = self._read(settings)
        else:
            date = datetime.now(UTC).isoformat(timespec="seconds")
            self.content = {"date": date, **about, **settings, "rows": []}

    def row(self, name: str) -> dict[str, Any]:
        """What is known of a name; an empty mapping where nothing is."""
        return next((row for row in self.content["rows"] if row["name"] == name), {})

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        """Add values to the row of a name, and write the file."""
        row = self.row(name)
        if not row:
            row = {"name": name}
            self.content["rows"].append(row)
        row.update(values)
        self.write()

    def order(self, names: Sequence[str]) -> None:
        """Bring the rows of these names to the front, in their order."""
        place = {name: i for i, name in enumerate(names)}
        self.content["rows"].sort(key=lambda row: place.get(row["name"], len(place)))

    def write(self) -> None:
        """Write the file; an interruption leaves the one before or the new one, and nothing between."""
        self.content["peak_gib"] = max(peak_gib(), self.content.get("peak_gib", 0.0))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_name(f"{self._file.name}.part")
        beside.write_text(dumps(self.content) + "\n", encoding="utf-8")
        os.replace(beside, self._file)

    def _read(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        try:
            content = read_report(self.path)
        except ValueError as error:
            raise ValueError(f"{error} It isn't the result of an evaluation: write to another file.") from None
        if "rows" not in content:
            raise ValueError(f"{self.path} isn't the result of an evaluation: write to another file.")
        for key, value in settings.items():
            if content.setdefault(key, value) != value:
                raise ValueError(
                    f"{self.path} holds results of other settings ({key} is {content[key]!r} there and {value!r} "
                    "now): write to another file, or delete it."
                )
        return content


def read_report(path: Path) -> dict[str, Any]:
    """A report of an evaluation or of a benchmark; ValueError if the file is none."""
    content = read_json(path, "report")
    rows = content.get("rows", []) if isinstance(content, dict) else None
    named = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows)
    if not named:
        raise ValueError(f"{path} is no report: give a file that `sparse-prefill eval` wrote.")
    return content


def dumps(content: Any) -> str:
    """JSON with an indent, but lists of numbers and mappings of nothing nested on one line."""

    def joined(match: re.Match) -> str:
        return match[0][0] + " ".join(match[1].split()) + match[0][-1]

    return FLAT.sub(joined, NUMBERS.sub(joined, json.dumps(content, indent=1)))


def origin(
    command: str, device: torch.device | str, *, model: str | None, text: str | None, seed: int | None
) -> dict[str, Any]:
    """Where numbers come from, for the head of a report.

    Args:
        command (str): what makes them anew.
        device (torch.device | str): where the model is, or the tensors.
        model (str | None): name of the model; None for tensors of none, or of one that isn't known.
        text (str | None): what the model read, a file or the name of a source; None as for the model.
        seed (int | None): of what is drawn at random; None where nothing is, or where it isn't known.

    Returns:
        dict[str, Any]: these, "date", and what ``machine`` tells.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "command": command, **machine(device), "model": model, "text": text, "seed": seed}


def machine(device: torch.device | str) -> dict[str, Any]:
    """What numbers were measured on: device, threads, and versions.

    Args:
        device (torch.device | str): where the model is.

    Returns:
        dict[str, Any]: "device", "threads", "torch", "sparse_prefill" and "python".
    """
    from sparse_prefill import __version__

    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sparse_prefill": __version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device | str) -> str:
    """Name of the GPU or the CPU; of x86 CPUs, also by what they multiply bf16, which decides over its speed."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = (line.partition(":") for line in (CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []))
    told = {key.strip(): value.strip() for key, _, value in lines}
    name = re.sub(r"\((R|TM)\)| Processor$", "", told.get("model name") or platform.processor() or platform.machine())
    if flags := told.get("flags", "").split():
        has = [kind for flag, kind in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512_BF16")) if flag in flags]
        name += f" with {has[0]}" if has else " without AMX"
    return name


def peak_gib() -> float:
    """The most memory that this process has held so far, in GiB: of the GPU if it was used, else its own."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3)
