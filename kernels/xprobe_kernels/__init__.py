"""Tensors in, tensors out: the lens readout and the capture of hidden rows. Knows no model, no dataset, no file.

>>> from xprobe_kernels import Unembedding, lens
"""

from xprobe_kernels.capture import capture
from xprobe_kernels.readout import Readout, available_backends, lens
from xprobe_kernels.unembedding import Unembedding

__all__ = ["Readout", "Unembedding", "available_backends", "capture", "lens"]
