"""How a network inside the budget is chosen."""
