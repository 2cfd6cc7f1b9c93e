"""Lenses: what a hidden row says about the next token."""
