"""Adapters: other libraries' algorithms and APIs on top of `agents`. Each module needs its own optional package."""
