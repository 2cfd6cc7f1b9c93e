"""Probes: scikit-learn estimators that are trained on hidden states, and the controls that keep them honest."""

from xprobe.probes.registry import ACCURACY, ROC_AUC, Metric, Probe, get_probe, register, unregister
from xprobe.probes.settings import ProbeSettings

__all__ = ["ACCURACY", "ROC_AUC", "Metric", "Probe", "ProbeSettings", "get_probe", "register", "unregister"]
