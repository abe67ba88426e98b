"""The observed attention backends, and what their layers look like to a measurer."""
