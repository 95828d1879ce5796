"""arch.json and model.py, and the proof that they agree."""
