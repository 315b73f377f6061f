"""Speed of decoding on the CPU: ours, llama.cpp and transformers, in turns in one run.

    python -m tests.bench.bench_decode [--rounds 9] [--threads 2] [--peers llama.cpp] [--json FILE]

12 layers x 768, vocabulary 32,000, random bf16 weights, greedy, prompts of 20 tokens, 128 new ones;
ms of one decoding step. Dense at batch 1 and 8; 8 and 64 experts top-1 on every second layer; int8
and int4. Every round reads memory at full speed, too; fractions of bandwidth are bytes of the
active weights by ms by what that round gave. A round beside other load is repeated. Peers are
installed into ~/.cache/gptmoe-bench at first use (llama.cpp is compiled: a quarter of an hour); one
that cannot be is named with the reason, and its goals count as missed.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from gptmoe.generate.quantized import Weights
from gptmoe.loaded import LoadedModel
from tests.bench import decoding
from tests.bench.peers.child import Peer
from tests.bench.peers.environments import LLAMA, TRANSFORMERS, Missing
from tests.bench.quiet import Contestant, Rounds, measure, triad_bandwidth
from tests.bench.same_as_gpt2 import check_same

MODELS: dict[str, tuple[int, Weights, bool]] = {  # experts, weights, experts as in the file
    "ours": (0, "", False),
    "ours int8": (0, "int8", False),
    "ours int4": (0, "int4", False),
    "ours 8 experts": (8, "", False),
    "ours 64 experts": (64, "", False),
    "ours 64 experts, not packed": (64, "", True),
}
MIXTRAL = {8: "transformers Mixtral, 8 experts", 64: "transformers Mixtral, 64 experts"}
GPT2, LLAMA_CPP = "transformers GPT-2", "llama.cpp"
PEERS = {
    "llama.cpp": (LLAMA_CPP, LLAMA, "llama_peer.py"),
    "transformers": (GPT2, TRANSFORMERS, "transformers_peer.py"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """`ours` is to be at least so many times faster than `than`."""

    batch: int
    ours: str
    than: str
    least: float


GOALS = (
    Goal(batch=1, ours="ours", than=LLAMA_CPP, least=0.85),
    Goal(batch=1, ours="ours", than=GPT2, least=2.0),
    Goal(batch=8, ours="ours", than=LLAMA_CPP, least=1.0),
    Goal(batch=8, ours="ours", than=GPT2, least=1.6),
    Goal(batch=1, ours="ours 8 experts", than="ours", least=1 / 1.15),
    Goal(batch=1, ours="ours 64 experts", than="ours", least=1 / 1.15),
    Goal(batch=8, ours="ours 8 experts", than=MIXTRAL[8], least=2.0),
    Goal(batch=8, ours="ours 64 experts", than=MIXTRAL[64], least=2.0),
    Goal(batch=1, ours="ours int8", than="ours", least=1.1),
    Goal(batch=1, ours="ours int4", than="ours", least=1.7),
)
LINEAR_FRACTION, STEP_FRACTION = 0.85, 0.65
LINEAR = "ours, linear layers alone"


def main() -> None:
    """Check, measure, print the tables."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    print(check_same())
    print(f"STREAM triad {triad_bandwidth() / 1e9:.1f} GB/s")
    models = {
        name: decoding.model(experts, weights, map_experts=mapped)
        for name, (experts, weights, mapped) in MODELS.items()
    }
    facts = []
    with contextlib.ExitStack() as stack:
        peers = _peers(arguments.peers, arguments.threads, stack)
        for batch in (1, 8):
            rounds = measure(_contestants(models, peers, batch), rounds=arguments.rounds)
            print(_table(rounds, batch), flush=True)
            facts += [_verdict(goal, rounds) for goal in GOALS if goal.batch == batch]
            facts += _fractions(rounds) if batch == 1 else []
    for fact in facts:
        print(f"{fact['title']}: {fact['says']}   {'yes' if fact['reached'] else 'NO'}")
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _contestants(
    models: dict[str, LoadedModel], peers: dict[str, Peer], batch: int
) -> list[Contestant]:
    found = [
        Contestant(name, partial(decoding.step_s, model.engine(), batch))
        for name, model in models.items()
    ]
    if batch == 1:
        found.append(Contestant(LINEAR, partial(decoding.linear_s, models["ours"].network)))
    if peer := peers.get(LLAMA_CPP):
        found.append(Contestant(LLAMA_CPP, partial(_their_step_s, peer, batch=batch), peer.pid))
    if other := peers.get(GPT2):
        for experts, name in {0: GPT2, **MIXTRAL}.items():
            act = partial(_their_step_s, other, experts=experts, batch=batch)
            found.append(Contestant(name, act, other.pid))
    return found


def _their_step_s(peer: Peer, **what: int) -> float:
    return float(peer.ask(**what)["step_s"])


def _peers(wanted: Sequence[str], threads: int, stack: contextlib.ExitStack) -> dict[str, Peer]:
    """Those that can be had; of the others the reason is printed."""
    peers = {}
    for name, environment, script in map(PEERS.__getitem__, wanted):
        try:
            peers[name] = Peer(environment, script, str(threads))
        except Missing as missing:
            print(f"without {name}: {missing}")
            continue
        stack.callback(peers[name].close)
        print(f"{name}: {peers[name].about}")
    return peers


def _table(rounds: Rounds, batch: int) -> str:
    lines = [
        f"batch {batch}: ms of a step, median (middle half) of {len(rounds.other)} rounds; reading "
        f"{statistics.median(rounds.bandwidth) / 1e9:.1f} GB/s; other load "
        f"{100 * max(rounds.other):.1f} % at most, {rounds.repeated} rounds repeated for it"
    ]
    for name in rounds.seconds:
        low, high = rounds.spread_ms(name)
        line = f"    {name:<34}{rounds.median_ms(name):8.2f} ({low:.2f} to {high:.2f})"
        if batch == 1 and name in MODELS:
            read = _bytes(name)
            line += f"   {read / 1e6:6.1f} MB, {_fraction(rounds, name, read):.2f} of bandwidth"
        lines.append(line)
    return "\n".join(lines)


def _verdict(goal: Goal, rounds: Rounds) -> dict[str, object]:
    title = f"batch {goal.batch}: {goal.ours} against {goal.than}"
    if goal.than not in rounds.seconds:
        return {"title": title, "says": "not measured", "reached": False, **asdict(goal)}
    ratio = rounds.times_faster(goal.ours, goal.than)
    says = f"{ratio:.2f} times as fast, goal {goal.least:.2f}"
    return {"title": title, "says": says, "reached": ratio >= goal.least, "ratio": ratio}


def _fractions(rounds: Rounds) -> Iterator[dict[str, object]]:
    for name, least in ((LINEAR, LINEAR_FRACTION), ("ours", STEP_FRACTION)):
        ratio = _fraction(rounds, name, _bytes("ours"))
        says = f"{ratio:.2f} of bandwidth for {_bytes('ours') / 1e6:.1f} MB, goal {least}"
        yield {"title": f"batch 1: {name}", "says": says, "reached": ratio >= least, "ratio": ratio}


def _fraction(rounds: Rounds, name: str, num_bytes: float) -> float:
    pairs = zip(rounds.seconds[name], rounds.bandwidth, strict=True)
    return statistics.median(num_bytes / seconds / bandwidth for seconds, bandwidth in pairs)


def _bytes(name: str) -> float:
    experts, weights, _ = MODELS[name]
    return decoding.active_bytes(decoding.spec_with(experts), weights)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS), help="none: ours alone"
    )
    parser.add_argument("--json", type=Path, help="write verdicts to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
