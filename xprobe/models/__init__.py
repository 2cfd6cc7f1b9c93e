"""Loads models and finds their blocks, final norm and head."""
