"""Files that are replaced only by complete ones, and what is wrong with one that cannot be read."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

TEMPORARY = ".tmp"
"""Ending of files that are being written; one that is left over is of a process that was killed."""

READ_ERRORS = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, AssertionError, KeyError, AttributeError)
"""What SB3, PyTorch, ``pickle`` and ``zipfile`` raise for files that are damaged or of something else."""


def target_path(path: str | pathlib.Path, suffix: str) -> pathlib.Path:
    """
    :param path: as SB3 takes it
    :param suffix: appended if the path has none
    :return: the file to write, by SB3's rules: missing folders are made, and ``_2`` is appended to the name of a folder
    """
    target = pathlib.Path(path)
    if target.suffix == "":
        target = pathlib.Path(f"{target}.{suffix}")
    if target.is_dir():
        warnings.warn(f"Path '{target}' is a folder. Will save instead to {target}_2")
        target = pathlib.Path(f"{target}_2")
    if not target.parent.is_dir():
        warnings.warn(f"Path '{target.parent}' does not exist. Will create it.")
        target.parent.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(os.path.realpath(target))  # a link stays one


@contextmanager
def replacing(path: str | pathlib.Path, suffix: str) -> Iterator[IO[bytes]]:
    """
    Write a file under a temporary name, and put it in the place of ``path`` when it is complete and on the disk.

    :param path: of the file
    :param suffix: appended if the path has none
    :raises OSError: the file could not be written, with the reason; what was there before is unchanged
    """
    target = pathlib.Path(path)
    try:
        target = target_path(path, suffix)
        unfinished = target.with_name(target.name + TEMPORARY)
        try:
            with open(unfinished, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        there = "The file that is there is as it was." if target.is_file() else "Nothing was written."
        raise OSError(error.errno, f"saving failed ({error.strerror or error}). {there}", str(target)) from error
    _flush_folder(target.parent)


def _flush_folder(folder: pathlib.Path) -> None:
    """The new name is on the disk, too, where the system can do this for folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


@contextmanager
def reading(path: str | pathlib.Path | io.BufferedIOBase, suffix: str) -> Iterator[IO[bytes]]:
    """
    :param path: of the file, or an open one
    :param suffix: tried if there is no file without
    :raises FileNotFoundError: there is no such file
    :raises TypeError: neither a path nor an open file
    """
    if not isinstance(path, (str, pathlib.Path)):
        if not hasattr(path, "read"):
            raise TypeError(f"the path {path!r} has an invalid type: give a string, a pathlib.Path or an open binary file.")
        position = path.tell()
        yield path  # type: ignore[misc]
        path.seek(position)
        return
    plain, with_suffix = pathlib.Path(path), pathlib.Path(f"{path}.{suffix}")
    if not plain.is_file() and (with_suffix.is_file() or not (plain.suffix or plain.exists())):
        plain = with_suffix  # also if there is neither: the name that saving would have given is the one to be told
    with open(plain, "rb") as file:
        yield file


def check_agent_file(path: str | pathlib.Path | io.BufferedIOBase, needed: tuple[str, ...]) -> None:
    """
    Look at a saved agent without executing anything of it.

    :param path: of the file, or an open one
    :param needed: attributes that the agents of the algorithm have
    :raises ValueError: it is damaged or not of this algorithm
    """
    name = file_name(path)
    with reading(path, "zip") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.namelist()
                data = json.loads(archive.read("data")) if "data" in members else None
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
            raise ValueError(
                f"{name} is no saved agent, or a damaged one: it is not a readable zip file ({error})."
            ) from error
    if not isinstance(data, dict) or "policy.pth" not in members:
        raise ValueError(f"{name} is no saved agent: the zip file lacks the agent's settings (data) or networks (policy.pth).")
    if any(attribute not in data for attribute in needed):
        policy = data.get("policy_class", {})
        policy = policy.get("__module__", "") if isinstance(policy, dict) else ""
        other = f" (its policy is of {policy})" if policy and not policy.startswith("sb3_ezv2") else ""
        raise ValueError(f"{name} was not saved by EZV2, or by another version of it{other}.")


def unreadable(path: Any, error: BaseException) -> ValueError:
    """
    :param path: of the file, or an open one
    :param error: one of :data:`READ_ERRORS`
    :return: the same in a sentence
    """
    cause = textwrap.shorten(str(error), 200, placeholder=" ...")  # PyTorch lists every weight that is missing
    return ValueError(
        f"{file_name(path)} is damaged, or of another version of sb3-ezv2, PyTorch or Stable-Baselines3 "
        f"({type(error).__name__}: {cause})"
    )


def file_name(path: Any) -> str:
    """:return: what to call a file in a message"""
    return str(path) if isinstance(path, (str, pathlib.Path)) else str(getattr(path, "name", "the file"))
