"""A griffe extension that turns what docstrings write for `help()` into Markdown.

Roles such as :func:`rnn` become links of this site, shapes such as [T, B, H] become code, `text::` loses a colon, and
the section `Example:` becomes the section that griffe renders as code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?\.?([\w.]+)`")
_SHAPE = re.compile(r"(?<!\w)\[(?:[A-Z0-9*][\w·*+ ]*)(?:, [A-Z0-9*][\w·*+ ]*)*\](?!\()")
_DIRECTIVE = re.compile(r"^::: (llm_ext[\w.]*)$", re.MULTILINE)
_PAGES = Path(__file__).parent.parent / "reference"
# Names that have an anchor in the API reference. Some occur twice: ops.rnn and reference.rnn.
_ANCHORS = [name for page in sorted(_PAGES.glob("*.md")) for name in _DIRECTIVE.findall(page.read_text())]


def _link(role: re.Match[str], package: str) -> str:
    name = role[1]
    matches = [anchor for anchor in _ANCHORS if anchor == name or anchor.endswith(f".{name}")]
    same = [anchor for anchor in matches if anchor.startswith(package)]
    target = same[0] if same else matches[0] if len(matches) == 1 else None
    return f"[`{name}`][{target}]" if target else f"`{name}`"


def _to_markdown(text: str, package: str) -> str:
    lines = []
    literal = -1  # indentation of the line before a literal block, or -1 outside of one
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if literal >= 0 and line.strip() and indent <= literal:
            literal = -1
        if literal < 0:
            if line.rstrip().endswith("::"):
                literal, line = indent, line.rstrip()[:-1]
            # Every second piece between backticks is prose. "][" would be a link.
            pieces = re.split(r"(`+[^`]*`+)", line)
            pieces[::2] = [_SHAPE.sub(r"`\g<0>`", piece.replace("][", r"]\[")) for piece in pieces[::2]]
            line = _ROLE.sub(lambda role: _link(role, package), "".join(pieces))
            if line.strip() == "Example:":
                literal, line = indent, line.replace("Example:", "Examples:")
            # An admonition of griffe shows its title only.
            line = re.sub(r"^(\s*)(Inputs|Outputs): (\S.*)$", r"\1\2: \2: \3", line)
        lines.append(line)
    return "\n".join(lines)


class DocstringMarkdown(Extension):
    """Rewrite docstrings when their object has been loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of obj."""
        if obj.docstring is not None:
            obj.docstring.value = _to_markdown(obj.docstring.value, ".".join(obj.path.split(".")[:2]))
