"""Hypothesis without clock and without chance: the same cases in every run."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kernels", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kernels")
