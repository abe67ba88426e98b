"""The only room that knows vLLM: releases, runners, layers, patches, the registry, and the seat of process state.

It computes no statistics.
"""
