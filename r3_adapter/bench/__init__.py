"""What this project costs, beside the same work without it."""
