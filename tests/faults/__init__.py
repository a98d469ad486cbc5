"""Faults of the machine under `llm-ext`: `make faults` counts what it survives."""
