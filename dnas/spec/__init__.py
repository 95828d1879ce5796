"""Plain data: budgets, spaces, archs, costs."""
