"""`glassbox demo`: a real model, a real server, real traffic, and its attention as a table.

`demo_model.py` gets the model, `vllm_server.py` runs `vllm serve`, `traffic.py` sends requests, `table.py` prints what
was measured, `run.py` puts them in order. Tests and benchmarks use the model and the server too.
"""
