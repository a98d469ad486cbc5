"""Where a classifier or transcriber looked in a sample: weights of its attention, and gradients of its input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_ext.cli.data.features import FrontEnd
from llm_ext.cli.data.files import atomic_write
from llm_ext.cli.data.samples import Sample
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.classifier import Classifier
from llm_ext.cli.inference.explanation import token_texts
from llm_ext.cli.inference.picture import escape
from llm_ext.cli.inference.transcriber import Transcriber
from llm_ext.models import SequenceClassifier

__all__ = ["SampleExplanation", "draw_sample", "explain_classification", "explain_transcription"]

Picture = npt.NDArray[Any]
# Most tokens of a text whose weights are drawn, one row each.
MOST_ROWS = 200


@dataclass(frozen=True)
class SampleExplanation:
    """Where a model looked in a sample.

    Attributes:
        title: Above the picture.
        front_end: How the file became features.
        features: ``[S, F]``.
        influence: How much the result depends on each feature, ``[S, F]``: the absolute value of gradient times
            normalized feature.
        rows: The label, or each written token, whose attention is shown.
        weights: Their weights on the steps, ``[rows, S]``.
        summary: One line for the terminal.
    """

    title: str
    front_end: FrontEnd
    features: Picture
    influence: Picture
    rows: list[str]
    weights: Picture
    summary: str


def explain_classification(classifier: Classifier, sample: Sample) -> SampleExplanation:
    """Return where a classifier looked to choose the label of a sample.

    Raises:
        CommandError: The sample cannot be read, or is a text.
    """
    rows = _read(classifier, sample)
    x, lengths = (each.to(classifier.device) for each in classifier.reader.pad([rows]))
    x.requires_grad_(True)
    model = classifier.model
    if model.pool is None:
        scores, weights = model(x, lengths), x.new_zeros(1, x.shape[1])
    else:
        scores, weights = model.attend(x, lengths)
    probabilities = scores.softmax(-1)[0]
    best = int(probabilities.argmax())
    (gradient,) = torch.autograd.grad(scores[0, best], x)
    label, share = classifier.labels.names[best], f"{100 * probabilities[best].item():.1f} %"
    return SampleExplanation(
        title=f"{sample.name}: {label} ({share})",
        front_end=classifier.reader.front_end,
        features=rows,
        influence=_influence(x, gradient),
        rows=[label],
        weights=weights.detach().double().cpu().numpy(),
        summary=f"{label}\t{probabilities[best].item():.4f}",
    )


def explain_transcription(transcriber: Transcriber, sample: Sample) -> SampleExplanation:
    """Return where a transcriber looked to write each token of a sample.

    With CTC, which has no attention, the weights of a token are its probabilities at each step.

    Raises:
        CommandError: The sample cannot be read, or nothing or too much was written.
    """
    rows = _read(transcriber, sample)
    x, lengths = (each.to(transcriber.device) for each in transcriber.reader.pad([rows]))
    (ids,) = transcriber.search(x, lengths)
    if not ids:
        raise CommandError(f"{sample.name}: the model writes no text for it")
    if len(ids) > MOST_ROWS:
        raise CommandError(
            f"{sample.name}: the model writes {len(ids):,} tokens, but a picture shows at most {MOST_ROWS}"
        )
    x.requires_grad_(True)
    model, end = transcriber.model, transcriber.tokenizer.end
    if isinstance(model, SequenceClassifier):
        log_probabilities = model(x, lengths).log_softmax(-1)[0]  # [S, V + 1]
        weights = log_probabilities[:, ids].exp().T
        # The same best path that the search took.
        total = log_probabilities.max(-1).values.sum()
    else:
        target = torch.tensor([[end, *ids]], device=x.device)
        encoder_output, state = model.encode(x, lengths)
        attention, total = [], x.new_zeros(())
        for position in range(len(ids)):
            scores, state, alpha = model.step(target[:, position : position + 1], state, encoder_output, True)
            assert alpha is not None
            attention.append(alpha[0, 0])
            total = total + scores[0, 0].log_softmax(-1)[ids[position]]
        weights = torch.stack(attention)
    (gradient,) = torch.autograd.grad(total, x)
    text = transcriber.tokenizer.decode(ids)
    return SampleExplanation(
        title=f"{sample.name}: {text}",
        front_end=transcriber.reader.front_end,
        features=rows,
        influence=_influence(x, gradient),
        rows=token_texts(transcriber.tokenizer.tokenizer, ids),
        weights=weights.detach().double().cpu().numpy(),
        summary=text,
    )


def _read(reads: Classifier | Transcriber, sample: Sample) -> Picture:
    if reads.reader.tokenizer is not None:
        raise CommandError("explain draws samples of sound, images, video and arrays, not of text")
    return reads.reader.read(sample)


def _influence(x: torch.Tensor, gradient: torch.Tensor) -> Picture:
    influence: Picture = (x * gradient)[0].detach().abs().double().cpu().numpy()
    return influence


def draw_sample(explanation: SampleExplanation, path: Path) -> None:
    """Draw the sample, the influence of each of its features, and the weights of the steps.

    Steps go from left to right; those of an image that is read row by row from top to bottom.

    Args:
        explanation: The explanation to draw.
        path: The picture, PNG or SVG by its suffix.

    Raises:
        OSError: The file could not be written; a previous one stays.
    """
    # Imported here because it takes a second.
    from matplotlib.figure import Figure

    front_end, weights = explanation.front_end, explanation.weights
    downwards = front_end.kind == "image" and not front_end.patch
    pictures = [_as_picture(each, front_end) for each in (explanation.features, explanation.influence)]
    origin = "lower" if front_end.kind in ("audio", "array") else "upper"
    if downwards:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True, width_ratios=[1, 1, 0.6])
    else:
        width = min(max(6.0, 0.05 * pictures[0].shape[1]), 30.0)
        height = 0.9 + 0.22 * len(explanation.rows) if len(explanation.rows) > 1 else 1.4
        figure = Figure(figsize=(width, 4.4 + height), layout="constrained")
        axes = figure.subplots(3, 1, sharex=front_end.kind != "image", height_ratios=[2, 2, height])
    steps, (lines, columns) = weights.shape[1], pictures[0].shape
    # Pictures whose columns are steps share the axis of the weights, in units of steps.
    span = (-0.5, (columns if front_end.kind == "image" else steps) - 0.5)
    extent = (*span, -0.5, lines - 0.5) if origin == "lower" else (*span, lines - 0.5, -0.5)
    for axis, picture, cmap, name in zip(
        axes,
        pictures,
        ("gray" if front_end.kind in ("image", "video") else "magma", "inferno"),
        ("features", "influence"),
        strict=False,
    ):
        axis.imshow(picture, aspect="auto", origin=origin, cmap=cmap, extent=extent, interpolation="nearest")
        axis.set_title(name, fontsize=9, loc="left")
    last, name = axes[2], "attention" if weights.any() else "no attention"
    last.set_title(name, fontsize=9, loc="left")
    if downwards:
        last.barh((np.arange(steps) + 0.5) * front_end.stack - 0.5, weights.mean(0), height=0.9 * front_end.stack)
        axes[0].set_ylabel("row")
    elif len(explanation.rows) > 1:
        last.imshow(weights, aspect="auto", cmap="Blues", extent=(-0.5, steps - 0.5, len(weights) - 0.5, -0.5), vmin=0)
        last.set_yticks(range(len(weights)), [escape(row) for row in explanation.rows], fontsize=8)
    else:
        last.fill_between(range(steps), weights[0], step="mid", alpha=0.6)
        last.set_ylim(bottom=0)
    if not downwards:
        last.set_xlabel({"audio": "time, steps", "video": "frame", "image": "patch"}.get(front_end.kind, "step"))
        last.set_xlim(-0.5, steps - 0.5)
        axes[0].set_ylabel({"audio": "mel band", "array": "feature"}.get(front_end.kind, ""))
    figure.suptitle(escape(explanation.title), fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)


def _as_picture(rows: Picture, front_end: FrontEnd) -> Picture:
    """Return vectors ``[S, F]`` as a picture: an image as it is, the frames of a video side by side, columns else."""
    lines, width, channels = front_end.layout(rows.shape[1])
    picture: Picture
    S = len(rows)
    if front_end.kind == "image" and front_end.size is not None:
        grey = rows.reshape(S * lines, width, channels).mean(-1)
        if not front_end.patch:
            picture = grey[: front_end.size[0]]
        else:
            across = front_end.size[1] // width
            patches = grey.reshape(-1, width, width)
            whole = patches[: len(patches) // across * across].reshape(-1, across, width, width)
            picture = whole.transpose(0, 2, 1, 3).reshape(-1, across * width)
    elif front_end.kind == "video":
        picture = rows.reshape(S, lines, width, channels).mean(-1).transpose(1, 0, 2).reshape(lines, S * width)
    else:
        picture = rows.reshape(S * lines, width).T
    return picture
