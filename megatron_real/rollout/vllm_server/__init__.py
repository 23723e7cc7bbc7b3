"""vLLM behind its own HTTP server: the engine that asks it, and what runs inside the server."""
