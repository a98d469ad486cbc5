"""Benchmarks of llm_ext against its peers: `python -m bench`."""
