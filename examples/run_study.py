"""
Run a study
===========

The built-in questions in two languages: ``python examples/run_study.py [MODEL]``
"""

import sys

import xprobe

if len(sys.argv) > 2:
    sys.exit("usage: python examples/run_study.py [MODEL]")
model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
study = xprobe.run(model, languages=["en", "de"], limit=4)  # the setting "en-x"
print(study.stability[["phase", "stability", "readiness"]])  # one row per layer
onset, alpha = study.boundary["value"], study.alpha["value"]
print("median retrieval onset:", "undefined" if onset is None else f"layer {onset:g}")
print("Krippendorff's alpha of the onsets over languages:", "undefined" if alpha is None else f"{alpha:.3f}")
print("run folder:", study.path)
