"""Minutes of trouble: kills, freezes, cancels, refreshes and scaling under load.

    python -m tests.soak.soak [--minutes 30] [--seed 0]        what `make soak` runs

An application of two replicas, or one, each on two shards. Callers stream without a pause, some
leave early; meanwhile a shard is killed or frozen, the weights are refreshed, the replicas scaled.
At the end: each request has ended in the text that one process writes with its weights, or in a
documented code; no actor, placement group, place in an engine or file of a served checkpoint is
left over. Prints a line a minute, and a summary; exit status 1 if anything of this does not hold.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gptmoe
from cluster import env
from cluster.client import Client, GenerationError
from tests import small_model

PROMPTS = [
    "春风",
    "明月几时有",
    "白日依山尽",
    "千山",
    "床前明月光",
    "大江东去",
    "国破山河在",
    "红豆",
]
TOKENS = 40
CALLERS = 6
DOCUMENTED = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED"}
"""What a caller may get instead of a text, and may try again."""
LOST_WITH_A_REPLICA = "INTERNAL"
"""Streams of a replica that Ray Serve replaces or removes end so."""
CALM_S = 45.0
"""At the end nothing happens for so long: what was broken comes back."""


@dataclass
class Tally:
    """What became of all requests."""

    ended: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    texts: Counter[tuple[int, tuple[int, ...]]] = field(default_factory=Counter)
    """By prompt and tokens."""
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, counter: Counter[str], name: str) -> None:
        with self.lock:
            counter[name] += 1


class Caller(threading.Thread):
    """Streams one text after the other until told to stop; leaves some early."""

    def __init__(self, target: str, tally: Tally, stop: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self.target, self.tally = target, tally
        self.stop, self.dice = stop, random.Random(seed)

    def run(self) -> None:
        with Client(self.target, timeout_s=120.0) as client:
            while not self.stop.is_set():
                try:
                    self.call(client)
                except GenerationError as error:
                    self.refused(error)

    def call(self, client: Client) -> None:
        index = self.dice.randrange(len(PROMPTS))
        leaves_after = self.dice.choice([0, 0, 0, 3, 10])
        tokens: list[int] = []
        finished = False
        chunks = client.stream(PROMPTS[index], max_new_tokens=TOKENS, temperature=0)
        for count, chunk in enumerate(chunks, 1):
            tokens += chunk.token_ids
            finished = bool(chunk.finish_reason)
            if leaves_after and count == leaves_after:
                self.tally.note(self.tally.ended, "left")
                return
        self.tally.note(self.tally.ended, "text" if finished else "WRONG")
        if finished:
            self.tally.texts[index, tuple(tokens)] += 1
        else:
            self.tally.wrong.append(f"{PROMPTS[index]}: ended without a finish")

    def refused(self, error: GenerationError) -> None:
        known = error.code in DOCUMENTED or error.code == LOST_WITH_A_REPLICA
        self.tally.note(self.tally.ended, error.code if known else f"WRONG {error.code}")
        if not known:
            self.tally.wrong.append(str(error))
        self.stop.wait(0.5)


class Trouble:
    """One kind of trouble after the other."""

    def __init__(self, target: str, checkpoints: list[Path], tally: Tally, seed: int) -> None:
        self.client = Client(target, timeout_s=120.0)
        self.checkpoints, self.tally = checkpoints, tally
        self.dice = random.Random(seed)
        self.version = 0
        self.replicas = 2

    def make(self) -> None:
        """One, at random; a refusal (a shard is away just now) counts as such."""
        kinds: list[Callable[[], str]] = [self.kill, self.freeze, self.refresh, self.scale]
        kind = self.dice.choice(kinds)
        try:
            name = kind()
        except GenerationError as error:
            name = f"{kind.__name__} refused: {error.code}"
        self.tally.note(self.tally.events, name)

    def kill(self) -> str:
        return self._signal(signal.SIGKILL, "kill")

    def freeze(self) -> str:
        return self._signal(signal.SIGSTOP, "freeze")

    def refresh(self) -> str:
        self.version += 1
        folder = self.checkpoints[self.version % len(self.checkpoints)]
        self.client.refresh(str(folder), restart=False, within_s=60.0)
        return "refresh"

    def scale(self) -> str:
        self.replicas = 3 - self.replicas
        self.client.scale(self.replicas, within_s=60.0)
        return f"scale to {self.replicas}"

    def _signal(self, number: int, name: str) -> str:
        pids = shard_pids()
        if not pids:
            return f"{name}: nobody there"
        os.kill(self.dice.choice(pids), number)
        return name


def shard_pids() -> list[int]:
    """Of all shards on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::ShardActor"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def soak(minutes: float, seed: int, folder: Path) -> Tally:
    """Serve, trouble, calm, count."""
    checkpoints = [small_model.write(folder / f"run{n}", seed=3 + n) for n in range(2)]
    words = ["checkpoint=" + json.dumps(str(checkpoints[0])), "grpc_port=0", "http_port=0"]
    words += ["parallel.ep=2", "replicas.min=2", "replicas.max=2", "--json"]
    variables = env.child_environment(starts_cluster=True)
    command = [sys.executable, "-m", "serve", *words]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        target = json.loads(process.stdout.readline())["grpc"]
        tally, stop = Tally(), threading.Event()
        callers = [Caller(target, tally, stop, seed + n) for n in range(CALLERS)]
        for caller in callers:
            caller.start()
        _trouble(Trouble(target, checkpoints, tally, seed), minutes, tally)
        time.sleep(CALM_S)
        stop.set()
        for caller in callers:
            caller.join(150.0)
            if caller.is_alive():
                tally.wrong.append("a request has not ended")
        _check_calm(target, tally)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    check_texts(tally, checkpoints)
    if left := shard_pids():
        tally.wrong.append(f"{len(left)} shards outlive the application")
    return tally


def _trouble(trouble: Trouble, minutes: float, tally: Tally) -> None:
    end_s, say_s = time.monotonic() + 60 * minutes, time.monotonic() + 60
    while time.monotonic() < end_s:
        time.sleep(trouble.dice.uniform(4, 15))
        trouble.make()
        if time.monotonic() > say_s:
            print(f"{dict(tally.ended)}  {dict(tally.events)}", flush=True)
            say_s += 60
    if trouble.replicas == 2:
        trouble.scale()


def _check_calm(target: str, tally: Tally) -> None:
    """One replica of two shards is left, whose places are all free."""
    with Client(target, timeout_s=60.0) as client:
        for prompt in PROMPTS * 2:  # as many as there are places
            client.generate(prompt, max_new_tokens=4, temperature=0)
        topologies = client.topology().topologies
    shards = [len(topology.owners) for topology in topologies]
    if shards != [2] or len(shard_pids()) != 2:
        tally.wrong.append(f"shards at the end: {shards}, processes: {len(shard_pids())}")


def check_texts(tally: Tally, checkpoints: list[Path]) -> None:
    """Each token is the greedy one of the weights in use. They change in mid-text only where a
    shard was lost while they were being refreshed, at most twice in so short a text."""
    models = [gptmoe.load(path) for path in checkpoints]
    for (index, tokens), count in tally.texts.items():
        prompt = list(models[0].tokenizer.encode(PROMPTS[index]))
        ids = [*prompt, *tokens]
        says = [model.logits([ids[:-1]])[0, len(prompt) - 1 :] for model in models]
        greedy = [
            logits[:, : models[0].tokenizer.vocab_size].argmax(-1).tolist() for logits in says
        ]
        speakers = [
            {m for m in range(2) if greedy[m][at] == token} for at, token in enumerate(tokens)
        ]
        if not all(speakers) or _changes(speakers) > 2:
            tally.wrong.append(f"{count} times {PROMPTS[index]}: tokens of no weights: {speakers}")


def _changes(speakers: list[set[int]]) -> int:
    """How often the speaker changes, at the least."""
    changes, now = 0, {0, 1}
    for said in speakers:
        if not now & said:
            changes, now = changes + 1, {0, 1}
        now &= said
    return changes


def main() -> int:
    """Print what happened; 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(arguments.minutes, arguments.seed, Path(folder))
    print(f"requests {dict(tally.ended)}\nevents   {dict(tally.events)}")
    for line in tally.wrong:
        print(f"WRONG: {line}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
