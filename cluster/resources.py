"""What a cluster has and what a run needs, in words. No Ray."""

from collections.abc import Mapping


def gpus_per_worker(cluster: Mapping[str, float]) -> int:
    """GPUs that each worker of a training run takes: one where the cluster has any at all."""
    return 1 if cluster.get("GPU") else 0


def needed(workers: int, gpus_per_worker: int = 0, spare_cpus: int = 0) -> dict[str, float]:
    """What so many workers ask of a cluster at the least."""
    amounts = {"CPU": float(workers + spare_cpus), "GPU": float(workers * gpus_per_worker)}
    return {name: amount for name, amount in amounts.items() if amount}


def at_once(
    workers: int, least: int, cluster: Mapping[str, float], gpus_per_worker: int = 0
) -> int:
    """How many of up to `workers` workers run together on a cluster that has these resources.

    Never fewer than `least`: without room for those nothing starts.
    """
    per_worker = needed(1, gpus_per_worker)
    room = min(int(cluster.get(name, 0.0) // amount) for name, amount in per_worker.items())
    return min(workers, max(least, room))


def missing(needed: Mapping[str, float], available: Mapping[str, float]) -> str:
    """What is lacking (`2 of 4 CPU, 1 of 1 GPU`); empty if nothing is."""
    gaps = {name: amount - available.get(name, 0.0) for name, amount in needed.items()}
    return ", ".join(f"{gap:g} of {needed[name]:g} {name}" for name, gap in gaps.items() if gap > 0)
