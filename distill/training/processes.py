"""How a process of several leaves the others."""

from __future__ import annotations

import atexit
import gc
import time

import torch.distributed as dist

if dist.is_available():
    # Its functions take the group of their import's time as a default, and an optimiser imports it: imported after the
    # group was made, it would hold the group for good.
    import torch.distributed.nn  # noqa: F401


def part_at_exit() -> None:
    """Have this process leave its group, if it is in one, before Python ends; may be called again.

    gloo's threads let go of the last batch of tensors after the call that waited for it has returned, and need the
    interpreter for it: where that has begun to end, the process aborts ("terminate called without an active
    exception"). A group that is destroyed ends its threads first.
    """
    atexit.unregister(_part)
    atexit.register(_part)


def _part() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a group that lies in a cycle would go too late
        time.sleep(0.2)  # torch keeps the groups of sharded nets: their threads live on, but have let go by then
