"""Plain data: budgets, spaces, architectures, costs."""
