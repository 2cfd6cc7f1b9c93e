"""The run folder: files, journal, lock and manifest. Knows no stage."""
