"""In a vLLM worker: the hook on its steps, the observer, and the thread that writes what was measured."""
