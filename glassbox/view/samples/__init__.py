"""Labelled samples: the data that features are extracted from, the table of features, and what can be learned of it."""
