"""Leaving the package: an expert as a checkpoint that needs nothing of it."""
