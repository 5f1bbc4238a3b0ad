"""Helpers that tests share: `from helpers.tiny_models import ...` (pytest's pythonpath is tests/)."""
