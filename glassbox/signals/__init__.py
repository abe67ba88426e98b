"""Signals of a request: numbers that need many of its rows, from its trace.

They are features, not verdicts: each is a published or obvious summary of attention, and none of them says by itself
that an answer is wrong or a prompt hostile. Compare requests of one model with each other.
"""

from glassbox.signals.request import SATURATED_ABOVE, Signals, request_signals

__all__ = ["SATURATED_ABOVE", "Signals", "request_signals"]
