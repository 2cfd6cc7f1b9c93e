"""How good answers are: normalisers, F1 and EM, error types, summaries with intervals. Texts in, numbers out."""
