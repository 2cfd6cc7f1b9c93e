"""`python -m xprobe_cli`: the same as `xprobe`, straight from a checkout."""

from xprobe_cli.main import script

script()
