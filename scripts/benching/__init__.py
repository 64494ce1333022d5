"""The parts of `scripts/bench.py`: how things are timed, and what is."""
