"""glassbox's HTTP side: metrics, snapshots and the live page, on its own port and inside vLLM's API server.

Nothing in this package imports torch or vLLM, and nothing in it writes: it shows what lies in the run directory.
"""
