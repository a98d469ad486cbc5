"""Helpers that tests share: tolerances, inputs, comparisons. Imported as `from support.X import ...`."""
