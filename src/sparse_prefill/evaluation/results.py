"""Results on disk: written after each step, and continued by a second run."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparse_prefill.core.files import check_output, read_json

NUMBER_LIST = re.compile(r"\[\s+(-?\d[^\[\]{}\"]*?)\s+\]")  # a list of numbers over several lines
FLAT_MAPPING = re.compile(r"\{\s+([^\[\]{}]*?)\s+\}")  # a mapping without nested values
CPU_INFO = Path("/proc/cpuinfo")


class Results:
    """A report that is written to a JSON file after each step.

    Args:
        path (str | Path): the file. Results with the same settings are kept; results with other settings are an error,
            and nothing is overwritten. Settings that the file lacks are added. Links are followed.
        settings (Mapping[str, Any]): settings that the numbers depend on, as plain numbers, strings, lists and dicts.
        about (Mapping[str, Any]): other facts for the reader, such as the command and the machine.

    Attributes:
        content (dict[str, Any]): the report: about, settings, "rows" with a "name" each, and "failures", the errors of
            strategies that failed, if there are any.

    Raises:
        ValueError: if the file holds results with other settings, or something else, or it can't be written.
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
        """The row of a name; an empty mapping if there is none."""
        return next((row for row in self.content["rows"] if row["name"] == name), {})

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        """Add values to the row of a name and write the file."""
        row = self.row(name)
        if not row:
            row = {"name": name}
            self.content["rows"].append(row)
        row.update(values)
        self.write()

    def order(self, names: Sequence[str]) -> None:
        """Move the rows of these names to the front, in their order."""
        place = {name: i for i, name in enumerate(names)}
        self.content["rows"].sort(key=lambda row: place.get(row["name"], len(place)))

    def report_failures(self, names: Collection[str], failures: Mapping[str, str]) -> None:
        """Keep the errors of strategies, so that a report without their rows says why; write the file if they changed.

        Args:
            names (Collection[str]): the strategies that were measured, or tried; their earlier errors are dropped.
            failures (Mapping[str, str]): errors of those that failed.
        """
        known = self.content.get("failures", {})
        found = {name: error for name, error in known.items() if name not in names} | dict(failures)
        if found == known:
            return
        self.content.pop("failures", None)
        if found:
            self.content["failures"] = found
        self.write()

    def write(self) -> None:
        """Write the file; after an interruption it is either the earlier or the new one, never a part."""
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
                    f"{self.path} holds results with other settings ({key} is {content[key]!r} there and {value!r} "
                    "now): write to another file, or delete it."
                )
        return content


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of an evaluation or a benchmark; ValueError if the file isn't one."""
    content = read_json(path, "report")
    rows = content.get("rows", []) if isinstance(content, dict) else None
    named = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows)
    if not named:
        raise ValueError(f"{path} is no report: give a file that `sparse-prefill eval` wrote.")
    return content


def dumps(content: Any) -> str:
    """Indented JSON, with lists of numbers and flat mappings on one line."""

    def joined(match: re.Match) -> str:
        return match[0][0] + " ".join(match[1].split()) + match[0][-1]

    return FLAT_MAPPING.sub(joined, NUMBER_LIST.sub(joined, json.dumps(content, indent=1)))


def origin(
    command: str, device: torch.device | str, *, model: str | None, text: str | None, seed: int | None
) -> dict[str, Any]:
    """The origin of the numbers in a report.

    Args:
        command (str): the command that reproduces them.
        device (torch.device | str): device of the model or the tensors.
        model (str | None): name of the model; None if tensors come from no model or an unknown one.
        text (str | None): the text, as a file or the name of a source; None as for the model.
        seed (int | None): seed of random numbers; None if there are none or it is unknown.

    Returns:
        dict[str, Any]: these values, "date", and those of :func:`machine`.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "command": command, **machine(device), "model": model, "text": text, "seed": seed}


def machine(device: torch.device | str) -> dict[str, Any]:
    """The machine that numbers were measured on: device, threads and versions.

    Args:
        device (torch.device | str): device of the model.

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
    """Name of the GPU or the CPU; for x86 CPUs also their bf16 instructions, which decide over its speed."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = (line.partition(":") for line in (CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []))
    info = {key.strip(): value.strip() for key, _, value in lines}
    name = re.sub(r"\((R|TM)\)| Processor$", "", info.get("model name") or platform.processor() or platform.machine())
    if flags := info.get("flags", "").split():
        has = [kind for flag, kind in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512_BF16")) if flag in flags]
        name += f" with {has[0]}" if has else " without AMX"
    return name


def peak_gib() -> float:
    """Peak memory of this process so far, in GiB: on the GPU if it was used, else on the host."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3)
