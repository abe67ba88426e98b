"""Hypothesis for kernels: without clock and without chance, as everywhere, and with fewer cases of these dear ones."""

from hypothesis import settings

settings.register_profile("kernels", settings.get_profile("glassbox"), max_examples=60)
settings.load_profile("kernels")
