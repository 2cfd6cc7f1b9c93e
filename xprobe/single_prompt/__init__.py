"""Tools for one prompt, without a run folder and a question set."""
