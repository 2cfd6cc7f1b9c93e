"""Runs models larger than memory block by block from the checkpoint."""
