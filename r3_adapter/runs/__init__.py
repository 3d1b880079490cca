"""What a run writes, and the page that compares runs."""
