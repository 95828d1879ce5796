"""Metrics, warnings, pictures and pages of a run."""
