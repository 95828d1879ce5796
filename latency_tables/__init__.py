"""The place of measured latency tables: package data only, no code."""
