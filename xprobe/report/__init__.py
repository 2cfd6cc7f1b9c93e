"""Shows a finished run: the page, and the figures for papers. Renders, computes nothing."""
