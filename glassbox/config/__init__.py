"""The YAML, from the file to a frozen model, and following it while it changes. It knows nothing of vLLM."""
