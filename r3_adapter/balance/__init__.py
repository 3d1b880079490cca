"""How even the loads of expert-parallel ranks are, and what makes them more so: placement, composition, budgets."""
