"""Torch's work in a thread that ends with it, for a process that computes in another one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_brief_thread(call: Callable[[], T]) -> T:
    """What `call` returns or raises, from a thread that is gone afterwards, its pool with it.

    GNU OpenMP gives each thread that calls torch a pool of its own and keeps it as long as that
    thread lives. Once the pools of a process have more threads than there are cores, their threads
    sleep between two loops where they would have waited awake (libgomp, config/linux/wait.h). A
    step of decoding has some hundred short loops: it then takes twice its time. So where one
    thread computes for good, nothing else with many threads (loading, packing, newer weights) may
    run in a thread that stays.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="brief") as thread:
        return thread.submit(call).result()
