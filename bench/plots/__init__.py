"""Pictures of a run, as SVG or PNG."""

from __future__ import annotations

from bench.plots.lengths import draw_lengths
from bench.plots.overview import draw_overview
from bench.plots.scaling import SCALING_GROUP, draw_scaling
from bench.plots.speedup import draw_speedup, mean_speedups

__all__ = ["SCALING_GROUP", "draw_lengths", "draw_overview", "draw_scaling", "draw_speedup", "mean_speedups"]
