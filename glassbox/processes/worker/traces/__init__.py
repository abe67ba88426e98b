"""In a worker: which requests are traced, what is kept of them, and writing it."""
