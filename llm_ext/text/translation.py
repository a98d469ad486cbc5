"""Learning to write the target of a source, and translating lines with what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from llm_ext.seq2seq import Seq2Seq, Tables
from llm_ext.text import pairs as pairing
from llm_ext.text import tokens as vocabulary
from llm_ext.text.checkpoint import Run
from llm_ext.text.config import TranslateConfig
from llm_ext.text.errors import TextError
from llm_ext.text.evaluate import EvaluationStoppedError, Score
from llm_ext.text.pairs import ROWS, Batch, Batches, Language, Numbers, PairFiles, Pairs, by_length, make_batch, pad
from llm_ext.text.task import Task, Total

# Lines read ahead, so that those translated side by side are of like length.
WINDOW = 1024
# Tables of more bytes are not made, however many lines there are.
TABLE_BYTES = 512 << 20


class TranslationTask(Task):
    """A translator and its pairs.

    Args:
        fabric: the processes.
        config: the settings.
        run: where the vocabularies are, or are to be.
        files: of the pairs: one, tab-separated, or that of the sources and that of the targets.
        val: likewise, for validation; if none, a part of the pairs in `files`.
        cache: directory for the encoded pairs.
        model: what is to be trained on; None for a new one, with new vocabularies.

    Raises:
        TextError: a file cannot be used, or there are too few pairs.
    """

    model: Seq2Seq
    unit = "pairs at a time"

    def __init__(
        self,
        fabric: Fabric,
        config: TranslateConfig,
        run: Run,
        files: Sequence[Path],
        val: Sequence[Path],
        cache: Path,
        model: Seq2Seq | None,
    ) -> None:
        self.fabric, self.config, self.notes = fabric, config, []
        shared = config.vocabularies == "shared"
        parts = [PairFiles(*part) for part in (files, val) if part]
        with fabric.rank_zero_first():
            if model is None and fabric.is_global_zero:
                run.path.mkdir(parents=True, exist_ok=True)
                paths = [run.vocabulary] if shared else [run.vocabulary, run.target_vocabulary]
                for side, path in enumerate(paths):
                    sides = (0, 1) if shared else (side,)
                    # Characters that only the validation has would be impossible to encode.
                    more = parts[1] if len(parts) == 2 else None
                    pairing.learn(config.tokens, parts[0], config.vocab_size, sides, more).save(path)
            source = vocabulary.load(run.vocabulary)
            target = source if shared else vocabulary.load(run.target_vocabulary)
            self.vocabularies = (source, target)
            self.source, self.target = Language(source), Language(target)
            texts = [
                pairing.encode(part, self.source, self.target, cache, config.longest, self.notes.append)
                for part in parts
            ]
        if model is None:
            torch.manual_seed(config.seed)
            model = Seq2Seq(
                self.source.size,
                self.target.size,
                config.embedding,
                config.hidden,
                config.layers,
                config.dropout,
                cell=config.cell,
                nonlinearity=config.nonlinearity,
                attn_dim=config.attn_dim,
                input_feeding=config.input_feeding,
                share_embedding=shared,
                tie_head=config.tie_head,
            )
        self.model = self.module = model

        self.fingerprints = [text.fingerprint() for text in texts]
        training, self.validation = texts[0], texts[-1]
        chosen, self.held_out = np.arange(len(training)), np.arange(len(self.validation))
        if len(texts) == 1:
            chosen, self.held_out = training.split(config.val_fraction)
        if not len(self.held_out):
            raise TextError(
                "there must be at least one pair for validation, got none; "
                "give more pairs, a larger --val-fraction, or --val"
            )
        self.batch = config.batch * fabric.world_size
        first = config.batch * fabric.global_rank
        self.mine = slice(first, first + config.batch)
        self.batches = Batches(training, chosen, self.batch, config.seed, (self.source.end, self.target.end))
        self.longest = int(training.source_lengths[chosen].max()) + 1

    def introduction(self) -> str:
        sizes = f"{self.source.size:,} tokens in the vocabulary"
        if self.config.vocabularies == "two":
            sizes = f"{self.source.size:,} and {self.target.size:,} tokens in the vocabularies"
        return (
            f"{sizes} ({self.source.tokens.kind}), "
            f"{len(self.batches.chosen):,} pairs to train on, {len(self.held_out):,} to validate"
        )

    def loss(self, wrapped: nn.Module, step: int, draw: Callable[[], object]) -> tuple[Tensor, int]:
        batch, tokens = self.batches.read(step, self.mine)
        batch = self.fabric.to_device(batch)
        draw()
        scores = wrapped(*batch[:-1])
        nats = F.cross_entropy(scores, batch.expected, reduction="sum", label_smoothing=self.config.label_smoothing)
        # Each token counts the same, in whichever process it is.
        return nats * (self.fabric.world_size / tokens), tokens

    def validate(self, wrapped: nn.Module, total: Total, stop: Callable[[], bool]) -> Score:
        ends = (self.source.end, self.target.end)
        device, rank, world = self.fabric.device, self.fabric.global_rank, self.fabric.world_size
        return evaluate_pairs(
            wrapped, self.validation, self.held_out, ends, self.target.tokens, device,
            rank=rank, world=world, total=total, stop=stop,
        )  # fmt: skip

    def carried(self, total: Total) -> dict[str, Tensor]:
        """Return how many pairs a step has: which they are follows from it and from the step."""
        return {"batch": torch.tensor([self.batch])}

    def known(self) -> dict[str, int]:
        return {"longest": self.longest}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.check_batch(int(tensors["batch"]))


def evaluate_pairs(
    model: nn.Module,
    pairs: Pairs,
    chosen: Numbers,
    ends: tuple[int, int],
    tokens: vocabulary.Tokens,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    stop: Callable[[], bool] = lambda: False,
) -> Score:
    """Measure the loss of the targets given their sources; the ends of the targets count as tokens.

    Args:
        model: in evaluation mode.
        pairs: of which some are chosen.
        chosen: their numbers.
        ends: ids that end a source and a target.
        tokens: the vocabulary of the targets.
        device: of the model.
        rank: of this process.
        world: how many processes there are.
        total: adds up a tensor over the processes.
        stop: asked before each batch.

    Raises:
        EvaluationStoppedError: `stop` said so.
    """
    order = chosen[by_length(pairs, chosen)]
    # The end has no text.
    n_bytes = np.array([*map(len, tokens.pieces), 0])
    n_characters = np.array([*(sum(byte & 0xC0 != 0x80 for byte in piece) for piece in tokens.pieces), 0])
    sums = np.zeros(4)
    with torch.inference_mode():
        for begin in range(0, len(order), ROWS * world):
            if stop():
                raise EvaluationStoppedError
            mine = order[begin + ROWS * rank : begin + ROWS * (rank + 1)]
            if not len(mine):
                continue
            batch = make_batch(pairs, mine, ends)
            ids = batch.expected.numpy()
            sums += _nats(model, batch, device), ids.size, n_characters[ids].sum(), n_bytes[ids].sum()
    nats, *counts = total(torch.from_numpy(sums).to(device)).tolist()
    return Score(nats, *(int(n) for n in counts))


def _nats(model: nn.Module, batch: Batch, device: torch.device) -> float:
    batch = Batch(*(None if part is None else part.to(device) for part in batch))  # type: ignore[arg-type]
    return F.cross_entropy(model(*batch[:-1]), batch.expected, reduction="sum").item()


class Translator:
    """A trained model with its vocabularies, from line to line.

    Args:
        model: in evaluation mode.
        source: the vocabulary of what it reads.
        target: that of what it writes.
        longest: tokens of the longest source it was trained on, or None if that is not known.
    """

    def __init__(self, model: Seq2Seq, source: Language, target: Language, longest: int | None = None) -> None:
        self.model, self.source, self.target, self.longest = model, source, target, longest

    @classmethod
    def load(cls, run: Run, which: str, device: torch.device) -> Translator:
        """Load the "last" or the "best" checkpoint of a run.

        Raises:
            TextError: something is missing, damaged, does not fit, or is of another task.
        """
        checkpoint = run.checkpoint(which)
        model = checkpoint.model()
        if not isinstance(model, Seq2Seq):
            raise TextError(f"{run.path}: holds a language model, which cannot translate; llm-ext generate uses it")
        source, target = run.vocabularies(model)
        longest = checkpoint.config["training"].get("longest")
        return cls(model.to(device).eval(), Language(source), Language(target), longest)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def encode(self, line: str, where: str, say: Callable[[str], object]) -> list[int]:
        """Return the ids of a source; `say` is told, with where it stands, if it is longer than any seen in training.

        Raises:
            TextError: the vocabulary has no tokens for it.
        """
        try:
            ids = self.source.encode(line).tolist()
        except TextError as error:
            raise TextError(f"{where}: {error}") from None
        if self.longest is not None and len(ids) >= 2 * self.longest:
            say(
                f"{where}: {len(ids):,} tokens, where the longest source of the training had {self.longest - 1:,}; "
                "the translation may be poor"
            )
        return ids  # type: ignore[no-any-return]

    def stream(self, ids: Sequence[int], max_length: int | None = None) -> Iterator[str]:
        """Translate one source by greedy search, yielding text as soon as its characters are complete."""
        source, _ = self._batch([ids])
        found = self.model.stream(source, self.target.end, None, max_length)
        return self.target.stream(int(each) for each in found)

    def translate(
        self,
        sources: Sequence[Sequence[int]],
        *,
        beam: int = 1,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        max_length: int | None = None,
        tables: Tables | None = None,
    ) -> list[list[str]]:
        """Translate sources side by side; the options are those of `Seq2Seq.search`, and a beam of 1 is greedy search.

        Returns:
            `num_return_sequences` targets of each source, best first; an empty source has empty ones.
        """
        full = [number for number, ids in enumerate(sources) if len(ids)]
        found = [[""] * num_return_sequences for _ in sources]
        if not full:
            return found
        source, lengths = self._batch([sources[number] for number in full])
        if beam == 1:
            columns = list(self.model.stream(source, self.target.end, lengths, max_length, tables))
            rows = torch.stack(columns, 1).tolist() if columns else [[] for _ in full]
            lines = [[self.target.decode(row)] for row in rows]
        else:
            hypotheses = self.model.search(
                source,
                self.target.end,
                lengths,
                beam=beam,
                num_return_sequences=num_return_sequences,
                length_penalty=length_penalty,
                max_length=max_length,
                tables=tables,
            )
            lines = [[self.target.decode(each.ids.tolist()) for each in row] for row in hypotheses]
        for number, row in zip(full, lines, strict=True):
            found[number][: len(row)] = row
        return found

    def lines(
        self, lines: Iterable[tuple[str, str]], batch: int, say: Callable[[str], object], **options: int | float | None
    ) -> Iterator[list[str]]:
        """Translate lines, in their order; batches are formed of lines of like length.

        Args:
            lines: where each stands, for messages, and its text.
            batch: lines translated side by side.
            say: told of what is odd about a line.
            options: of `translate`.

        Raises:
            TextError: a line cannot be read or encoded; the translations of those before it are yielded first.
        """
        failure: TextError | None = None

        def encoded() -> Iterator[list[int]]:
            nonlocal failure
            try:
                for where, line in lines:
                    yield self.encode(line.strip(), where, say) if line.strip() else []
            except TextError as error:
                failure = error

        ids = encoded()
        tables: Tables | None = None
        # One line at a time is for those who wait for each.
        while window := list(islice(ids, WINDOW if batch > 1 else 1)):
            if tables is None and self._repays_tables(sum(map(len, window))):
                tables = self.model.tables()
            order = sorted(range(len(window)), key=lambda n: len(window[n]))
            found: dict[int, list[str]] = {}
            for begin in range(0, len(order), batch):
                numbers = order[begin : begin + batch]
                rows = self.translate([window[n] for n in numbers], tables=tables, **options)  # type: ignore[arg-type]
                found.update(zip(numbers, rows, strict=True))
            yield from (found[n] for n in range(len(window)))
        if failure is not None:
            raise failure

    def _repays_tables(self, tokens: int) -> bool:
        """Whether so many tokens are worth tables of the vocabularies, which cost the same for each entry of theirs."""
        model = self.model
        w_hh = model.encoder.all_weights[0][1]
        numbers = (2 * model.source_vocab_size + model.target_vocab_size) * len(w_hh)
        most = max(model.source_vocab_size, model.target_vocab_size)
        return tokens > most and numbers * w_hh.element_size() <= TABLE_BYTES

    def _batch(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        source, lengths = pad([np.array(ids, dtype=np.int64) for ids in sources], self.source.end)
        device = self.device
        return source.to(device), lengths.to(device) if (lengths < source.shape[1]).any() else None


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> tuple[float, str]:
    """Return the BLEU of lines, 0 to 100, and the signature of how sacrebleu measured it.

    Args:
        hypotheses: the lines.
        references: one or more lists of as many lines; None where a line has fewer references.

    Source: Post, "A call for clarity in reporting BLEU scores", arXiv 1804.08771.
    """
    # Imported here: training does without it.
    from sacrebleu import BLEU

    metric = BLEU()
    # Its types do not say that it takes None.
    score = metric.corpus_score(list(hypotheses), cast(Sequence[Sequence[str]], references))
    return float(score.score), str(metric.get_signature())
