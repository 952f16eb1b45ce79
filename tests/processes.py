# SPDX-License-Identifier: BSD-3-Clause
"""Processes that form one gloo group and run functions for a test, which hangs in none of them."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_SECONDS = 60


class Ranks:
    """``world_size`` processes with one thread each.

    They stay from call to call, as their start takes seconds; a call that fails ends them, and the next one starts new
    ones.
    """

    def __init__(self, folder: Path, world_size: int = 2) -> None:
        self._folder = folder
        self._world_size = world_size
        self._starts = 0
        self._processes: list[multiprocessing.Process] = []
        self._connections: list[multiprocessing.connection.Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, *arguments)`` returns on each rank; it is a function of a module, as are its arguments.

        Raises:
            RuntimeError: it raised on one of the ranks, whose traceback is told.
            TimeoutError: it takes more than a minute.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while len(results) < self._world_size:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
            if not ready:
                self.close()
                raise TimeoutError(f"{function.__name__} ran for more than {_TIMEOUT_SECONDS} s")
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    failed, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    failed, value = True, "the process ended"
                if failed:
                    self.close()
                    raise RuntimeError(f"{function.__name__} on rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self._world_size)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        self._starts += 1
        context = multiprocessing.get_context("spawn")
        store = self._folder / f"store{self._starts}"
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self._world_size, str(store)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


def _serve(connection: multiprocessing.connection.Connection, rank: int, world_size: int, store: str) -> None:
    faulthandler.enable()  # a process that dies tells where
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=_TIMEOUT_SECONDS),
    )
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:  # the test run is over
            return
        try:
            answer = False, function(rank, *arguments)
        except Exception:
            answer = True, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
