"""Shared memory in which loader workers make batches and the training process reads them without a copy.

A `DataLoader` passes every batch in fresh shared memory. The system clears each page, maps it in both processes and
frees it again, which costs several times as much as reading 16-bit samples. These blocks are mapped once and reused.
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
# All memories that this process made or was forked with.
_known: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()
# The memory that this process, a worker, makes its batches in; None elsewhere.
_in_use: BatchMemory | None = None


class Block(NamedTuple):
    """Address of a batch's audio that is sent to the training process.

    Attributes:
        memory: number of the memory.
        number: number of the block in it.
        shape: [B, S].
        dtype: numpy's name of the data type.
    """

    memory: int
    number: int
    shape: tuple[int, ...]
    dtype: str

    def opened(self) -> Tensor:
        """The audio in place; the block is free again when nothing refers to this tensor's memory."""
        array, _ = _known[self.memory].array(self.number, self.shape, np.dtype(self.dtype))
        return torch.from_numpy(array)


class BatchMemory:
    """Blocks for batches, some for each worker. Make it before the workers are forked.

    Args:
        workers: number of workers.
        blocks: batches of each worker that may be in transit or in use at once; more are passed as by `DataLoader`.
        size: bytes of the largest batch. Pages that no batch has used yet take no memory.

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
        """Make the batches of this process, the worker of that number, in this memory from now on."""
        global _in_use
        _in_use = self
        self._mine = range(worker * self.blocks, (worker + 1) * self.blocks)

    def array(self, number: int, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, weakref.finalize]:
        """A block as an array, and the finalizer that frees it once nothing refers to the array's memory."""
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
        """A free block of this worker, uninitialised; None if there is none, or it is too small."""
        if math.prod(shape) * dtype.itemsize > self.size:
            return None
        # The first free one: it is in the processor's caches, and as few blocks as possible take memory.
        number = next((each for each in self._mine if not self._taken[each]), None)
        if number is None:
            return None
        self._taken[number] = 1
        array, self._unsent[number] = self.array(number, shape, dtype)
        return array

    def sent(self, audio: Tensor) -> Block | None:
        """Pass a batch's block to the training process, which frees it; None if the audio is not in a block."""
        number, rest = divmod(audio.data_ptr() - self._begin, self.size)
        if rest or number not in self._mine or number not in self._unsent or not audio.is_contiguous():
            return None
        self._unsent.pop(number).detach()
        return Block(self.serial, number, tuple(audio.shape), audio.numpy().dtype.name)


def memory_for(workers: int, batches_ahead: int, size: int) -> BatchMemory | None:
    """Memory for forked workers; None if the system has no room for it.

    Args:
        workers: number of workers.
        batches_ahead: batches that each prepares ahead.
        size: bytes of the largest batch.
    """
    try:
        # Besides those in transit: the batch in use, the next one, and the last one, which a failure would save.
        return BatchMemory(workers, batches_ahead + 3, size)
    except (OSError, ValueError, OverflowError):
        return None


def new_rows(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory for a batch [B, S]; in a worker, if possible in shared memory."""
    rows = None if _in_use is None else _in_use.fresh(shape, dtype)
    # numpy, unlike torch, asks for huge pages: fresh small ones cost more than filling them.
    return np.empty(shape, dtype) if rows is None else rows


def packed(tensor: Tensor | None) -> Tensor | np.ndarray | Block | None:
    """Replacement of a tensor that a worker sends; the tensor itself in other processes.

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
