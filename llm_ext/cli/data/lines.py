"""Lines of text as token ids with an end-of-line id, for sources and targets of a translator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llm_ext.cli.data.tokenizer import Ids, Tokenizer

__all__ = ["LineTokenizer"]


class LineTokenizer(NamedTuple):
    """A tokenizer with one more id, which ends every line and begins every target."""

    tokenizer: Tokenizer

    @property
    def size(self) -> int:
        """The number of ids, the end of a line included."""
        return self.tokenizer.size + 1

    @property
    def end(self) -> int:
        """The id that ends a line."""
        return self.tokenizer.size

    def encode(self, line: str) -> Ids:
        """Return the ids of a line without its end.

        Raises:
            CommandError: The vocabulary cannot represent the line.
        """
        # The space makes the first word of a line the same token as inside a line.
        return self.tokenizer.encode(f" {line}" if self.leading_space else line)

    def cut(self, ids: Ids, most: int) -> Ids:
        """Return the longest beginning of a line of at most `most` ids that ends with a word; at least one id."""
        if len(ids) <= most:
            return ids
        for end in range(most, 0, -1):
            if self.tokenizer.pieces[ids[end]][:1].isspace():
                return ids[:end]
        return ids[:most]  # one word

    def decode(self, ids: Iterable[int]) -> str:
        """Return the line of ids; ends are skipped."""
        text = self.tokenizer.decode(i for i in ids if i != self.end)
        return _on_one_line(text.removeprefix(" ") if self.leading_space else text)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the line of ids up to the first end, as soon as each character is complete."""

        def until_end() -> Iterator[int]:
            for i in ids:
                if i == self.end:
                    return
                yield i

        leading_space = self.leading_space
        for piece in self.tokenizer.stream(until_end()):
            if piece:
                yield _on_one_line(piece.removeprefix(" ") if leading_space else piece)
                leading_space = False

    @property
    def leading_space(self) -> bool:
        """Whether a line is encoded with a space before it."""
        return self.tokenizer.kind == "bpe"


def _on_one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")
