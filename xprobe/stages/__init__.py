"""The stages of a run: each reads the run folder and adds its tables and its entry in the manifest."""
