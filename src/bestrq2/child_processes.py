"""Child processes: how many to start, and that they never outlive the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_WATCH_SECONDS = 1.0


def end_with_parent(parent: int) -> None:
    """End this process as soon as its parent has ended, however that ended.

    To be called in the child, as early as possible. On Linux the kernel kills the child when the thread that started it
    ends, so children are started from the main thread; elsewhere a thread checks the parent once a second.

    Args:
        parent: process id of the parent, noted before the child was started: it may be gone by now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    elif hasattr(os, "getppid"):
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()
    if os.getppid() != parent:  # it ended before the request
        os._exit(1)


def become_worker(parent: int) -> None:
    """Make this process a worker of its parent: it ends with it, and leaves signals sent to the whole job to it."""
    end_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def available_cpus() -> int:
    """Number of CPUs that this process may use; fewer than the machine has in a container or under SLURM."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
