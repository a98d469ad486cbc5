"""Benchmarks of llm_ext against other libraries: `python -m bench`."""
