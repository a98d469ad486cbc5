"""Translation and summaries of lines with a trained model; BLEU and ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypedDict, cast

import torch
from torch import Tensor

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.batches import pad_lines
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.device import device_of
from llm_ext.cli.errors import CommandError
from llm_ext.models import InputProjections, Seq2Seq
from llm_ext.ops.argument_checks import gates_of

__all__ = ["SearchOptions", "Translator", "bleu", "rouge"]

# Lines read ahead, so that lines translated together have similar lengths.
WINDOW = 1024
# Input projections of more bytes are not precomputed.
MAX_PROJECTION_BYTES = 512 << 20


class SearchOptions(TypedDict, total=False):
    """Options of `Translator.translate`."""

    beam: int
    num_return_sequences: int
    length_penalty: float
    no_repeat_ngram_size: int
    max_length: int | None


class Translator:
    """A trained translator or summarizer with its tokenizers: writes a line for each line.

    Args:
        model: Model in evaluation mode.
        source: Tokenizer of the sources.
        target: Tokenizer of the targets.
        longest: Tokens of the longest source of the training, its end included; None if unknown.
        longest_source: Tokens to which `encode` cuts a source; None: it does not.

    Attributes:
        cuts: Number of sources that `encode` has cut.
    """

    def __init__(
        self,
        model: Seq2Seq,
        source: LineTokenizer,
        target: LineTokenizer,
        longest: int | None = None,
        longest_source: int | None = None,
    ) -> None:
        self.model, self.source, self.target, self.longest = model, source, target, longest
        self.longest_source, self.cuts = longest_source, 0

    @classmethod
    def load(cls, run: Run, which: str, device: torch.device, *tasks: str) -> Translator:
        """Load a checkpoint of a run.

        Args:
            run: The run directory.
            which: "last" or "best".
            device: Device of the model.
            tasks: Tasks that the model may have; by default those of a `Seq2Seq`.

        Raises:
            CommandError: A file is missing, damaged, or does not match, or the model is of another task.
        """
        checkpoint, model = run.load(which, *(tasks or ("translate", "summarize")))
        assert isinstance(model, Seq2Seq)
        source, target = map(LineTokenizer, run.tokenizers(model))
        longest, longest_source = map(checkpoint.limit, ("longest", "longest_source"))
        return cls(model.to(device), source, target, longest, longest_source)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.model)

    def encode(self, line: str, where: str, warn: Callable[[str], object]) -> list[int]:
        """Return the ids of a source, cut if it is too long.

        Args:
            line: The source.
            where: Its file and line number, for messages.
            warn: Receives a message if the source is much longer than those of the training.

        Raises:
            CommandError: The vocabulary cannot represent the source.
        """
        try:
            encoded = self.source.encode(line)
        except CommandError as error:
            raise CommandError(f"{where}: {error}") from None
        if self.longest_source is not None and len(encoded) > self.longest_source:
            encoded = self.source.cut(encoded, self.longest_source)
            self.cuts += 1
        ids: list[int] = encoded.tolist()
        if self.longest is not None and len(ids) >= 2 * self.longest:
            warn(
                f"{where}: {len(ids):,} tokens, but the longest source of the training had {self.longest - 1:,}; "
                "the result may be poor"
            )
        return ids

    def stream(self, ids: Sequence[int], max_length: int | None = None) -> Iterator[str]:
        """Translate one source by greedy search, yielding text as soon as each character is complete."""
        source, _ = self._batch([ids])
        found = self.model.stream(source, self.target.end, max_length=max_length)
        return self.target.stream(int(each) for each in found)

    def translate(
        self,
        sources: Sequence[Sequence[int]],
        *,
        beam: int = 1,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        max_length: int | None = None,
        input_projections: InputProjections | None = None,
    ) -> list[list[str]]:
        """Translate a batch of sources; the options are those of `Seq2Seq.search`, and a beam of 1 is greedy search.

        Returns:
            For each source `num_return_sequences` targets, best first; those of an empty source are empty.
        """
        nonempty = [number for number, ids in enumerate(sources) if len(ids)]
        targets = [[""] * num_return_sequences for _ in sources]
        if not nonempty:
            return targets
        source, lengths = self._batch([sources[number] for number in nonempty])
        if beam == 1 and not no_repeat_ngram_size:
            columns = list(
                self.model.stream(
                    source, self.target.end, lengths, max_length=max_length, input_projections=input_projections
                )
            )
            rows = torch.stack(columns, 1).tolist() if columns else [[] for _ in nonempty]
            lines = [[self.target.decode(row)] for row in rows]
        else:
            hypotheses = self.model.search(
                source,
                self.target.end,
                lengths,
                beam=beam,
                num_return_sequences=num_return_sequences,
                length_penalty=length_penalty,
                no_repeat_ngram_size=no_repeat_ngram_size,
                max_length=max_length,
                input_projections=input_projections,
            )
            lines = [[self.target.decode(each.ids.tolist()) for each in row] for row in hypotheses]
        for number, row in zip(nonempty, lines, strict=True):
            targets[number][: len(row)] = row
        return targets

    def translate_lines(
        self,
        lines: Iterable[tuple[str, str]],
        batch: int,
        warn: Callable[[str], object],
        options: SearchOptions | None = None,
    ) -> Iterator[list[str]]:
        """Translate lines in their order, in batches of lines of similar length.

        Args:
            lines: File and line number, for messages, and text of each line.
            batch: Lines per batch.
            warn: Receives messages about unusual lines.
            options: Options of the search.

        Yields:
            The targets of each line, as `translate` returns them.

        Raises:
            CommandError: A line cannot be read or encoded; translations of the lines before it are yielded first.
        """
        failure: CommandError | None = None

        def encoded() -> Iterator[list[int]]:
            nonlocal failure
            try:
                for where, line in lines:
                    yield self.encode(line.strip(), where, warn) if line.strip() else []
            except CommandError as error:
                failure = error

        ids = encoded()
        projections: InputProjections | None = None
        # With a batch of one, each line is answered before the next is read.
        while window := list(islice(ids, WINDOW if batch > 1 else 1)):
            if projections is None and self._worth_projecting(sum(map(len, window))):
                projections = self.model.input_projections()
            order = sorted(range(len(window)), key=lambda n: len(window[n]))
            targets: dict[int, list[str]] = {}
            for begin in range(0, len(order), batch):
                numbers = order[begin : begin + batch]
                rows = self.translate(
                    [window[n] for n in numbers], input_projections=projections, **(options or SearchOptions())
                )
                targets.update(zip(numbers, rows, strict=True))
            yield from (targets[n] for n in range(len(window)))
        if failure is not None:
            raise failure

    def _worth_projecting(self, tokens: int) -> bool:
        """Return whether this many tokens outweigh the input projections, one per vocabulary entry."""
        encoder, vocabularies = self.model.encoder, (self.source.size, self.target.size)
        values = (2 * vocabularies[0] + vocabularies[1]) * gates_of(encoder.mode) * encoder.hidden_size
        element_size = next((p.element_size() for p in encoder.parameters()), 4)  # a quantized encoder has none
        return tokens > max(vocabularies) and values * element_size <= MAX_PROJECTION_BYTES

    def _batch(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        source, lengths = pad_lines(sources, self.source.end)
        return source.to(self.device), None if lengths is None else lengths.to(self.device)


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> tuple[float, str]:
    """Return the BLEU of lines, 0 to 100, and the signature of its measurement by sacrebleu.

    Args:
        hypotheses: The lines.
        references: One or more lists with a reference for each line; None for a missing reference.

    Source: Post, "A call for clarity in reporting BLEU scores", arXiv 1804.08771.
    """
    # Imported here because training does not need it.
    from sacrebleu import BLEU

    metric = BLEU()
    # The type hints of sacrebleu do not mention that it accepts None.
    score = metric.corpus_score(list(hypotheses), cast(Sequence[Sequence[str]], references))
    return float(score.score), str(metric.get_signature())


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L of lines by rouge-score, 0 to 100: the mean F1 of stemmed words.

    Args:
        hypotheses: The lines.
        references: A reference for each line. Words are of the letters a to z and digits; others are not compared.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, https://aclanthology.org/W04-1013.
    """
    # Imported here because training does not need it.
    from rouge_score.rouge_scorer import RougeScorer

    names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    scorer = RougeScorer([*names.values()], use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, hypotheses, strict=True)]
    return {name: 100 * sum(score[key].fmeasure for score in scores) / len(scores) for name, key in names.items()}
