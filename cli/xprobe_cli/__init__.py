"""The `xprobe` command: parses, calls the library, prints. Holds no analysis."""
