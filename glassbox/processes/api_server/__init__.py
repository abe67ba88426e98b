"""In vLLM's API server: what is done with a request's `glassbox` keys, its spans, and the routes of the live page."""
