"""The parts of `scripts/compare_algorithms.py`."""
