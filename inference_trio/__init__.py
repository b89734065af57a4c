"""An LLM inference session server on Trio: sessions over HTTP, generations over a JSON-RPC WebSocket."""

__version__ = "0.1.0"
