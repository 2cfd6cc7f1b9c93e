"""Relevance: how much each token matters at each layer for an answer, by gradients under documented rules."""
