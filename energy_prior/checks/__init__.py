"""Checks: of arguments at the boundary, and of a user's generator as a whole."""
