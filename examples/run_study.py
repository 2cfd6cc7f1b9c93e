"""Runs a study on the built-in questions in two languages: python examples/run_study.py [MODEL]"""

import sys

import xprobe

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
study = xprobe.run(model, languages=["en", "de"], limit=4)  # one setting: "en-x"
print(study.stability[["phase", "stability", "readiness"]])  # one row per layer
print("the answer comes into sight at layer", study.boundary["value"])
print("agreement of the languages on that layer:", study.alpha["value"])
print("the run folder:", study.path)
