"""Pairs for a summarizer from the Python code that is installed: a definition with its documentation, and its summary.

The source is the name and the arguments of a function or class and its docstring without the first paragraph; the
target is that paragraph, if it is one short sentence. Nothing is copied into this repository: the text is read from the
standard library (PSF license) and from packages that llm_ext installs, such as torch and numpy (BSD licenses).
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PACKAGES", "files_of", "pairs_of"]

PACKAGES = ("torch", "numpy", "matplotlib", "lightning_fabric", "tokenizers", "sacrebleu")
# Words of a docstring without its summary, which is cut, and of a summary.
LEAST_WORDS, MOST_WORDS, TARGET_WORDS = 8, 120, range(3, 21)

Pair = tuple[str, str]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def files_of(packages: Iterable[str]) -> list[Path]:
    """Return the files of the standard library and of packages, without tests."""
    paths = sysconfig.get_paths()
    standard, site = Path(paths["stdlib"]), Path(paths["purelib"])
    files = [path for path in standard.rglob("*.py") if "site-packages" not in path.parts]
    files += [path for package in packages for path in (site / package).rglob("*.py")]
    return sorted(path for path in files if not any(part.startswith(("test", "idle_test")) for part in path.parts))


def pairs_of(path: Path) -> list[Pair]:
    """Return the pairs of a file."""
    pairs: list[Pair] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old code has escapes that Python warns about
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return pairs
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            source = f"{_heading(node)} {_on_one_line(rest, MOST_WORDS)}"
            target = _on_one_line(summary)
            if len(rest.split()) >= LEAST_WORDS and len(target.split()) in TARGET_WORDS and ">>>" not in target:
                pairs.append((source, target))
    return pairs


def _heading(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"{node.name} ( {' '.join(arguments)} )"


def _on_one_line(text: str, words: int | None = None) -> str:
    return " ".join(text.split()[:words])
