"""`glassbox demo`: a real model, a real server, real traffic, and its attention as a table.

`model` gets the model, `server` runs `vllm serve`, `traffic` sends requests, `table` prints what was
measured, `run` puts them in order. Tests and benchmarks use `model` and `server` too.
"""
