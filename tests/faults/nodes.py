"""Several Ray nodes on one machine, that come and go."""

import subprocess
import sys

from cluster import env

NOTICE_S = 40
CLUSTER = f"""
import sys, time
import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

def drain(node):
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    until_ms = int((time.time() + {NOTICE_S}) * 1000)
    GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", until_ms)

def kill(node):
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    workers = raylet.children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:  # a machine takes them along; alone they live on for a while
        if worker.is_running():
            worker.kill()

options = dict(num_cpus=0, include_dashboard=False, object_store_memory=80_000_000)
cluster = Cluster(initialize_head=True, head_node_args=options)
nodes = []
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.startswith("add"):
        nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80_000_000))
    elif line.startswith("drain"):
        drain(nodes[-1])
    else:
        kill(nodes.pop(0 if line.startswith("oldest") else -1))
    print(len(nodes), flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster whose nodes of one CPU come and go."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        variables = env.child_environment(starts_cluster=True)
        command = [sys.executable, "-c", CLUSTER]
        self.process = subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, text=True)
        self.address = self._answer()

    def change(self, word: str, count: int) -> None:
        """`add`, `remove` (kill), kill the `oldest`, or `drain` (with notice) so many nodes."""
        assert self.process.stdin is not None
        for _ in range(count):
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
            self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
