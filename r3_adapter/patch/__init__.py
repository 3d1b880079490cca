"""Patch series for engines: apply, revert and verify them, on installed packages and source trees, and rebase them."""
