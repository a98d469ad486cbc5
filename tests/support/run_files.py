"""Changes of the files of a run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_ext.cli.data.files import CHECKSUM, write_json


def edit_json(path: Path, change: Callable[[dict[str, Any]], object], sealed: bool = True) -> None:
    """Change the JSON object of a file in place, and its checksum with it; or leave the checksum out."""
    value = json.loads(path.read_text(encoding="utf-8"))
    value.pop(CHECKSUM, None)
    change(value)
    if sealed:
        write_json(path, value)
    else:
        path.write_text(json.dumps(value), encoding="utf-8")
