"""Models larger than memory: read from the checkpoint block by block."""
