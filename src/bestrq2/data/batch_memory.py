"""Memory in which loader workers make batches and the training process reads them: nothing is copied in between.

A `DataLoader` hands every batch over in fresh shared memory. The system clears each page of that, maps it in both
processes and takes it away again, which costs several times what reading 16-bit samples does. These blocks are mapped
once and used again and again.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_serial = itertools.count()
# Every memory this process made, or was forked with.
_known: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()
# The memory that this process, a worker, makes its batches in; None elsewhere.
_in_use: BatchMemory | None = None


class Block(NamedTuple):
    """A batch's audio on its way to the training process: where it lies.

    Attributes:
        memory: number of the memory.
        number: of the block in it.
        shape: [B, S].
        dtype: as numpy names it.
    """

    memory: int
    number: int
    shape: tuple[int, ...]
    dtype: str

    def opened(self) -> Tensor:
        """The audio, read where it lies; the block is free again once nothing refers to this tensor's memory."""
        array, _ = _known[self.memory].array(self.number, self.shape, np.dtype(self.dtype))
        return torch.from_numpy(array)


class BatchMemory:
    """Blocks for batches, some for each worker. Make it before the workers are forked.

    Args:
        workers: number of workers.
        blocks: batches of each worker that may be on their way or in use at once; more go the way of `DataLoader`.
        size: bytes of the largest batch. Pages that no batch has reached yet take no memory.

    Raises:
        OSError: the system has no room for it.
    """

    def __init__(self, workers: int, blocks: int, size: int) -> None:
        self.serial, self.blocks, self.size = next(_serial), blocks, size
        self._pages = mmap.mmap(-1, workers * blocks * size)
        self._taken = mmap.mmap(-1, workers * blocks)
        self._begin = np.frombuffer(self._pages, np.uint8).ctypes.data
        self._mine = range(0)
        self._unsent: dict[int, weakref.finalize] = {}
        _known[self.serial] = self

    def use_here(self, worker: int) -> None:
        """Let this process, the worker of that number, make its batches in here from now on."""
        global _in_use
        _in_use = self
        self._mine = range(worker * self.blocks, (worker + 1) * self.blocks)

    def array(self, number: int, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, weakref.finalize]:
        """A block as an array, and what frees the block as soon as nothing refers to the array's memory."""
        array = np.ndarray(shape, dtype, self._pages, number * self.size)
        free = weakref.finalize(array, self._free, self._taken, number, os.getpid())
        free.atexit = False
        return array, free

    @staticmethod
    def _free(taken: mmap.mmap, number: int, owner: int) -> None:
        """Mark a block as free; a process forked later drops its copy of the array, not the block."""
        if os.getpid() == owner:
            taken[number] = 0

    def fresh(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
        """A block of this worker that nobody uses, uninitialised; None where there is none, or it is too small."""
        if math.prod(shape) * dtype.itemsize > self.size:
            return None
        # The first free one: it is in the caches, and as few blocks as possible ever hold pages.
        number = next((each for each in self._mine if not self._taken[each]), None)
        if number is None:
            return None
        self._taken[number] = 1
        array, self._unsent[number] = self.array(number, shape, dtype)
        return array

    def sent(self, audio: Tensor) -> Block | None:
        """Leave a batch's audio to the training process, which frees its block; None where it does not lie in one."""
        number, rest = divmod(audio.data_ptr() - self._begin, self.size)
        if rest or number not in self._mine or number not in self._unsent or not audio.is_contiguous():
            return None
        self._unsent.pop(number).detach()
        return Block(self.serial, number, tuple(audio.shape), audio.numpy().dtype.name)


def memory_for(workers: int, batches_ahead: int, size: int) -> BatchMemory | None:
    """Memory for forked workers; None where the system has no room for it.

    Args:
        workers: number of workers.
        batches_ahead: batches that each prepares ahead.
        size: bytes of the largest batch.
    """
    try:
        # Beside those on their way: the batch in use, the next one, and the last one, which a failure would save.
        return BatchMemory(workers, batches_ahead + 3, size)
    except (OSError, ValueError, OverflowError):
        return None


def new_rows(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory for a batch [B, S], in a worker if possible where the training process sees it."""
    rows = None if _in_use is None else _in_use.fresh(shape, dtype)
    # numpy asks for huge pages where torch does not: fresh small ones cost more than filling them.
    return np.empty(shape, dtype) if rows is None else rows


def packed(tensor: Tensor | None) -> Tensor | np.ndarray | Block | None:
    """What a worker sends in place of a tensor; elsewhere the tensor itself.

    Small tensors go as plain bytes: a `DataLoader` would open a file for each.
    """
    if tensor is None or _in_use is None:
        return tensor
    if (block := _in_use.sent(tensor)) is not None:
        return block
    return tensor.numpy() if tensor.nbytes < 1 << 20 else tensor


def unpacked(sent: Tensor | np.ndarray | Block | None) -> Tensor | None:
    """The tensor again."""
    if isinstance(sent, Block):
        return sent.opened()
    return torch.from_numpy(sent) if isinstance(sent, np.ndarray) else sent
