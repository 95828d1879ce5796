"""Methods: ways to choose one network inside the budget."""
