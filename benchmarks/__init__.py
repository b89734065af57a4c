"""The server measured beside others: ``uv run python -m benchmarks``."""
