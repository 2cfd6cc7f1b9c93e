"""Fixtures that several tests share: a tiny saved model, and a cache folder of the session's own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# one thread per test process, several processes: tiny models gain nothing from threads, and threads that wait for one
# another make everything slow on a busy machine. Must stand before torch is imported, here and in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell that starts the tests in the background leaves Ctrl-C ignored, and children inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

# Triton's kernels run in its interpreter where there is no GPU; the choice is made when they are first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support.families import save_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama with a byte-level tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder that holds nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XPROBE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def forks(tiny):
    """Runs of the tiny model in forks of one process: quick to start, free to be killed."""
    if not Path("/proc/self/fd").is_dir() or not hasattr(os, "fork"):
        pytest.skip("needs fork and /proc")
    from forks import Forks

    forks = Forks(tiny)
    yield forks
    forks.close()
