"""Bringing a series to another release: what conflicts, what breaks, and the tests of both."""
