"""Imports of llm_ext.cli go one way, and its modules name what they export."""

from __future__ import annotations

import re

import pytest
from support.cli_runs import ROOT

CLI = ROOT / "llm_ext/cli"
# Each folder or module imports those before it.
ORDER = ("errors", "streams", "device", "data", "checkpoint", "inference", "training", "tuning", "commands")
MODULES = sorted(CLI.rglob("*.py"))


def room(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name: str) -> None:
    allowed = {*ORDER[: ORDER.index(name) + 1]}
    for path in MODULES:
        if room(str(path.relative_to(CLI))) == name:
            imported = set(re.findall(r"^\s*(?:from|import) llm_ext\.cli\.(\w+)", path.read_text(), re.MULTILINE))
            assert imported <= allowed, f"{path}: {name} must not import {imported - allowed}"


def test_every_module_has_a_room_and_names_its_exports() -> None:
    for path in MODULES:
        if path.parent != CLI or path.name not in ("__init__.py", "__main__.py"):
            assert room(str(path.relative_to(CLI))) in ORDER, path
        if path.name != "__main__.py":
            assert re.search(r"^__all__ = \[", path.read_text(), re.MULTILINE), f"{path}: no __all__"
