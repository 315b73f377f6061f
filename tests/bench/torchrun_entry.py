"""One rank of a run under torchrun: the workers' code without Ray.

torchrun --nproc-per-node 2 -m tests.bench.torchrun_entry CONFIG key=value ...
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gptmoe.config import load
from gptmoe.parallel import mesh as meshes
from tests.train.alone import run_alone
from train.config import TrainConfig
from train.plan import make_plan


def main() -> None:
    """Rank and world come from torchrun's environment."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    config = load(TrainConfig, Path(sys.argv[1]), sys.argv[2:])
    if rank == 0:
        make_plan("pretrain", config)  # prepares the data
    dist.barrier()
    plan = make_plan("pretrain", config)
    run_alone(plan, meshes.join(config.parallel.layout(), rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
