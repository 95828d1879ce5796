"""Processes, run folders, checkpoints, signals and progress."""
