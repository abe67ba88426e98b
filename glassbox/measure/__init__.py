"""Which steps and rows are measured, on what device, into what; the contract between measurers, kernels and traces.

It knows nothing of vLLM: the adapter makes its views of layers and batches.
"""
