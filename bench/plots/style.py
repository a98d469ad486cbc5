"""Colours, fonts and files that all pictures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "LIBRARY_NAMES", "pyplot", "save", "title"]

# By library; dark enough on white, and distinct for readers who do not tell red from green.
COLOURS = {
    "torch": "#c44e00",
    "compile": "#8a5a00",
    "onnxruntime": "#0067a8",
    "openvino": "#6a3d9a",
    "jax": "#00785a",
    "haste": "#a0336e",
    "flashrnn": "#3d5a99",
    "llm_ext": "#000000",
    "limit": "#888888",
}
LIBRARY_NAMES = {
    "torch": "torch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "jax": "JAX",
    "haste": "Haste",
    "flashrnn": "FlashRNN",
    "llm_ext": "llm_ext, used in another way",
    "limit": "limit of the machine",
}


def pyplot() -> Any:
    """Return matplotlib.pyplot, set up to draw files."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and ids do not change from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 8})
    from matplotlib import pyplot

    return pyplot


def title(run: dict[str, Any]) -> str:
    """Return machine and settings of a run in one line."""
    isa = run["versions"]["build_info"]["isa"].replace("avx512_bf16", "avx512").upper().replace("AVX512", "AVX-512")
    threads, dtype = run["settings"]["threads"], run["settings"]["dtype"]
    return f"{run['machine']['cpu']}, {isa}, {threads} thread{'s' * (threads > 1)}, {dtype}"


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's suffix, without a date."""
    if path.suffix == ".svg":
        figure.savefig(path, metadata={"Date": None})
    else:
        figure.savefig(path, dpi=100)
    pyplot().close(figure)
