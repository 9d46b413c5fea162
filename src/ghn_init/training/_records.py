"""A file of JSON lines to which a long measurement adds, and from which an interrupted one goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ghn_init._errors import TrainingError
from ghn_init._files import reason
from ghn_init.training._output import writing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects in the file; none if there is no file. A last line that was cut off is passed over.

    Raises:
        TrainingError: The file cannot be read, or has another line that is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise TrainingError(f"{path}: not a file of JSON lines ({error}); give another file") from error
    if not all(isinstance(record, dict) for record in records):
        raise TrainingError(f"{path}: expected a JSON object in every line; give another file")
    return records


def add_record(path: Path, *records: Mapping[str, Any]) -> None:
    """Add a line for each record to the file, made if need be, in place of a last line that was cut off.

    Raises:
        TrainingError: It cannot be written.
    """
    with writing(path), path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(f"{json.dumps(record)}\n" for record in records).encode())
