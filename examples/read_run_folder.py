"""
Read a run with pandas
======================

A finished run without xprobe: ``python examples/read_run_folder.py RUN_FOLDER``
"""

import json
import sys
from pathlib import Path

import pandas as pd

if len(sys.argv) != 2:
    sys.exit("usage: python examples/read_run_folder.py RUN_FOLDER")
run = Path(sys.argv[1])
if not (run / "manifest.json").is_file():
    sys.exit(f"{run} is not a run folder: it has no manifest.json")
manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
layers = pd.read_parquet(run / "layers.parquet")  # setting, layer, language, signal, value, lo, hi, n
examples = pd.read_parquet(run / "examples.parquet")  # one row per question, language and setting
print(manifest["model"]["name"], "on", manifest["data"]["name"])
readiness = layers[layers["signal"] == "readiness"]
print(readiness.pivot(index=["setting", "layer"], columns="language", values="value").round(2))
print(examples.groupby(["setting", "language"])["onset"].describe().round(1))
