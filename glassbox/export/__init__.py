"""From a worker's snapshot file to Prometheus, OTLP and JSONL.

Nothing in this package imports torch or vLLM: the exporter is its own small process, and the API server only
scrapes.
"""
