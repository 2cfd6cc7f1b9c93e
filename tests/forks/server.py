"""Runs in forks of one process that has everything imported and the model's code loaded: 0.2 s each instead of 5.

A program of its own: ``python -m forks.server MODEL``. It reads one JSON object per line and answers with one:
``{"run": {...arguments of xprobe.run}, "out": DIR, "at": N}`` or ``{"cli": [...arguments], "say": FILE}`` starts a fork
and gives its process id; ``{"wait": PID}`` gives how it ended, as ``subprocess`` counts it, and what it noted. With
``"slow": [DIR, SECONDS]``, a forward pass of the latter takes at least this long once the run folder holds a shard.

With ``at``, the fork kills itself right before its Nth step that changes the folder: opening a file to write, syncing,
renaming, removing, half of a line's writing. With ``half`` it lives on, but no file may grow beyond 64 bytes: the
system kills it in the middle of the next write. Without ``at``, it notes every step.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401
import torch
import xprobe_cli.main
import xprobe_cli.run

import xprobe
import xprobe.phases.tables
from xprobe.models import loading


class Steps:
    """Counts what the fork does to the folder; kills it before step ``at``."""

    def __init__(self, folder: str, at: int | None, half: bool) -> None:
        self.folder, self.at, self.half = os.path.realpath(folder), at, half
        self.seen: list[str] = []

    def watch(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; and only this thread may change that
        real_sync, real_write = os.fsync, os.write
        sys.addaudithook(self._audited)

        def fsync(handle: int) -> None:
            self.step("sync", os.readlink(f"/proc/self/fd/{handle}"))
            real_sync(handle)

        def write(handle: int, content: bytes) -> int:
            path = os.readlink(f"/proc/self/fd/{handle}")
            if self.step("half of a write to", path, kill=False):
                real_write(handle, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real_write(handle, content)

        os.fsync, os.write = fsync, write

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.step("open", arguments[0])
        elif event in ("os.rename", "os.remove", "os.mkdir"):
            self.step(event.removeprefix("os."), str(arguments[0]))

    def step(self, what: str, path: str, *, kill: bool = True) -> bool:
        if not os.path.realpath(path).startswith(self.folder):
            return False
        self.seen.append(f"{what} {os.path.relpath(os.path.realpath(path), self.folder)}")
        now = len(self.seen) == self.at
        if now and self.half:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        elif now and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return now


def fork(work: Any) -> tuple[int, int]:
    """Process id of a fork that does ``work``, and the end of a pipe that gives what it returns, as JSON."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        result, code = work()
        with os.fdopen(writing, "w") as stream:
            json.dump(result, stream)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(request: dict[str, Any]) -> tuple[Any, int]:
    steps = Steps(request["out"], request.get("at"), request.get("half", False))
    steps.watch()
    try:
        xprobe.run(out=request["out"], **request["run"])
    except xprobe.XprobeError as error:
        return {"error": f"{type(error).__name__}: {error}", "steps": steps.seen}, 1
    return {"steps": steps.seen}, 0


def cli(request: dict[str, Any]) -> tuple[Any, int]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
    said = os.open(request["say"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if "slow" in request:
        slow_down(*request["slow"])
    code = xprobe_cli.main.main(request["cli"])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return {"restored": handlers == [signal.default_int_handler, signal.SIG_DFL]}, code


def slow_down(folder: str, seconds: float) -> None:
    """From the first shard on, forward passes take at least this long, so that a signal meets one."""

    def wait(module: torch.nn.Module, _: Any) -> None:
        if type(module).__name__ == "LlamaModel" and any(Path(folder, "shards").glob("*.safetensors")):
            time.sleep(seconds)

    torch.nn.modules.module.register_module_forward_pre_hook(wait)


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    loading.load(loading.resolve(sys.argv[1]))  # what transformers imports only when it is used
    pipes: dict[int, int] = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            with os.fdopen(pipes.pop(request["wait"])) as stream:
                noted = stream.read()
            answer = {"code": os.waitstatus_to_exitcode(status), **(json.loads(noted) if noted else {})}
        else:
            pid, pipe = fork(lambda request=request: cli(request) if "cli" in request else run(request))
            pipes[pid] = pipe
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)
    for pid in pipes:  # of a test that failed before it waited
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
