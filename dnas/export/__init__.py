"""Write arch.json and model.py, and check that they agree."""
