"""Result files, and where a result comes from: machine and commit, as they stand in them."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch as th


def machine() -> str:
    """The processor, its cores, the threads used and the version of torch; nothing that tells whose machine it is."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    parts = [model, f"{os.cpu_count()} cores", f"torch threads {th.get_num_threads()}", f"torch {th.__version__}"]
    if th.cuda.is_available():
        parts.append(th.cuda.get_device_name())
    return ", ".join(parts)


def commit() -> str:
    """
    The commit of the code: git's short hash, with "-dirty" if files differ from it; "unknown" outside a repository.

    Results do not count as differences, or every second run into the working tree would be a dirty one.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """
    :param path: CSV file to write, in a folder that is made if need be
    :param rows: at least one, all with the names of the first
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
