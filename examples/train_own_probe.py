"""
A probe on stored states
========================

It predicts the number of tokens in a prompt from the state at the last token of the prompt:
``python examples/train_own_probe.py RUN_FOLDER``
"""

import sys

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import xprobe
from xprobe.runs.folder import RunFolder
from xprobe.runs.states import StoredStates

if len(sys.argv) != 2:
    sys.exit("usage: python examples/train_own_probe.py RUN_FOLDER")
study = xprobe.load_study(sys.argv[1])
examples = study.examples.reset_index(drop=True)
stored = StoredStates.from_run(RunFolder.open(study.path), examples, study.manifest)
if examples["paragraph"].nunique() < 2:
    sys.exit("a probe is tested on paragraphs that it was not trained on, and this run has only one")
folds = GroupKFold(min(5, examples["paragraph"].nunique()))  # a paragraph is in one fold only
for layers, states in stored.layers("prompt_end", np.arange(len(examples))):  # [K, N, D], as many layers as fit
    for layer, rows in zip(layers, states, strict=True):
        probe = make_pipeline(StandardScaler(), Ridge(alpha=len(rows)))
        scores = cross_val_score(probe, rows, examples["prompt_tokens"], groups=examples["paragraph"], cv=folds)
        print(f"layer {layer:>2}  R2 {scores.mean():.2f}")
