"""Probes: scikit-learn estimators that are trained on hidden states, and the controls that keep them honest."""
