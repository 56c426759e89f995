"""What all kinds of model files have in common: their hash, their errors, how they are written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from pydantic import ValidationError

from bcseg_batch.errors import CheckpointError, OutputError


def sha256_of(path: Path) -> str:
    """Hash a model file; hexadecimal.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"model file {path} cannot be read: {error.strerror}") from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Give the error of a file that cannot be read as safetensors."""
    return CheckpointError(
        f"model file {path} is damaged or is not safetensors ({error}): copy it again"
    )


def problems_of(error: ValidationError) -> str:
    """Say in one line what is wrong with a description."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"])))
        for item in error.errors()
    )


def write_model_file(path: Path, data: bytes) -> None:
    """Write a model file of either kind so that its name always stands for the whole of it.

    Raises:
        OutputError: the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OutputError(
            f"model file {path} cannot be written: {error.strerror}: name a folder that exists, "
            "may be written and has room"
        ) from error
