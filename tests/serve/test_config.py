"""The config of `python -m serve`, from file, overrides and options."""

import argparse
from pathlib import Path

import pytest

from gptmoe.config import load
from gptmoe.errors import ConfigError, LayoutError
from gptmoe.model.spec import ModelSpec
from serve.command import _parser, read_config
from serve.config import ParallelConfig, ServeConfig

FILE = Path(__file__).parents[2] / "configs" / "serve" / "local.toml"


def options(*arguments: str) -> argparse.Namespace:
    return _parser().parse_intermixed_args(arguments)


def test_the_shipped_file_holds_the_defaults(tmp_path: Path) -> None:
    checkpoint = f"checkpoint={tmp_path}"
    assert load(ServeConfig, FILE, [checkpoint]) == load(ServeConfig, None, [checkpoint])


def test_a_checkpoint_alone_is_enough() -> None:
    config = read_config(options("--checkpoint", "runs/a"))
    assert config.checkpoint == Path("runs/a")
    assert (config.http_port, config.grpc_port, config.replicas.max) == (8000, 9000, 1)


def test_options_win_over_overrides_and_overrides_over_the_file() -> None:
    words = ["http_port=0", "engine.max_queue=8", "checkpoint=runs/b"]
    config = read_config(options(str(FILE), *words, "--checkpoint", "诗 集", "--address", "auto"))
    assert config.checkpoint == Path("诗 集")
    assert config.address == "auto"
    assert config.http_port == 0
    assert config.engine.max_queue == 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "key checkpoint is missing"),
        (["a.toml", "b.toml"], "found 2 config files (a.toml, b.toml); name one at most"),
        (["missing.toml"], "config file missing.toml does not exist"),
        (["checkpoint=a", "grpcport=1"], "unknown config key grpcport; did you mean grpc_port?"),
        (["checkpoint=a", "http_port=99999"], "http_port=99999 is not a port"),
        (["checkpoint=a", "http_port=7", "grpc_port=7"], "are both 7; use two ports"),
        (["checkpoint=a", "threads=-1"], "threads=-1 must be at least 1"),
        (["checkpoint=a", "name="], "name is empty"),
        (["checkpoint=a", 'name="a#b"'], "name='a#b' may not contain #"),
        (["checkpoint=a", "dtype=fp8"], "dtype='fp8' is not known"),
        (["checkpoint=a", "replicas.min=-1"], "replicas.min=-1 must be at least 0"),
        (["checkpoint=a", "replicas.min=0", "replicas.max=0"], "replicas.max=0 must be at least 1"),
        (["checkpoint=a", "weights=int3"], "weights='int3' is not known"),
        (["checkpoint=a", "weights=int8", "parallel.ep=2"], "asks for 2 shards; use weights"),
        (["checkpoint=a", "device=tpu"], "device='tpu' is not known"),
        (["checkpoint=a", "device=cuda", "parallel.tp=2"], "asks for 2 shards; their caches and"),
        (["checkpoint=a", "device=cuda", "weights=int4"], 'weights="int4" is for CPUs; use'),
        (["checkpoint=a", "replicas.min=3"], "replicas.max=1 is below replicas.min=3"),
        (["checkpoint=a", "replicas.initial=2"], "replicas.initial=2 must lie between"),
        (["checkpoint=a", "scaling.slack=1"], "scaling.slack=1.0 must be at least 0 and below 1"),
        (["checkpoint=a", "health.stall_s=0"], "health.stall_s=0.0 must be a positive number"),
        (["checkpoint=a", "health.drain_s=nan"], "health.drain_s=nan must be a positive number"),
        (["checkpoint=a", "parallel.pp=0"], "parallel.pp=0 must be at least 1"),
        (["checkpoint=a", "parallel.hot=['1-3']"], 'parallel.hot="1-3" must be LAYER:NUMBER'),
        (["checkpoint=a", "shards.wait_s=0"], "shards.wait_s=0.0 must be a positive number"),
        (["checkpoint=a", "edge.port=70000"], "edge.port=70000 is not a port"),
        (["checkpoint=a", "edge.port=8000"], "edge.port and http_port are both 8000; use two"),
        (["checkpoint=a", "edge.port=9000"], "edge.port and grpc_port are both 9000; use two"),
        (["checkpoint=a", "edge.stall_s=0"], "edge.stall_s=0.0 must be a positive number"),
        (["checkpoint=a", "edge.tries=0"], "edge.tries=0 must be at least 1"),
        (["checkpoint=a", "edge.max_request_bytes=-1"], "edge.max_request_bytes=-1 must be at"),
        (["checkpoint=a", "edge.tls_key=k"], "edge.tls_cert and edge.tls_key go together"),
        (["checkpoint=a", "edge.client_ca=c"], "edge.client_ca wants edge.tls_cert and"),
        (["checkpoint=a", "edge.host=0.0.0.0"], "edge.host=0.0.0.0 without a certificate would"),
        (["checkpoint=a", "engine.max_batch_size=0"], "engine.max_batch_size=0 must be at least"),
    ],
)
def test_each_mistake_is_named(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(options(*words))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("words", "world"),
    [
        ([], 1),
        (["parallel.ep=2"], 2),
        (["parallel.pp=2", "parallel.ep=2"], 4),
        (["parallel.tp=2", "parallel.ep=4"], 4),
        (["parallel.pp=2", "parallel.ep=2", "parallel.expert_ranks=2"], 6),
    ],
)
def test_shards_are_counted_and_share_the_model(words: list[str], world: int) -> None:
    parallel = read_config(options("checkpoint=a", *words)).parallel
    spec = ModelSpec(num_layers=4, d_model=8, num_heads=2, d_ff=8, num_experts=(4, 4))
    assert parallel.world == len(parallel.parts(spec)) == world


def test_hot_experts_are_those_of_the_model() -> None:
    spec = ModelSpec(num_layers=4, d_model=8, num_heads=2, d_ff=8, num_experts=(4, 4))
    hot = read_config(options("checkpoint=a", "parallel.ep=2", 'parallel.hot=["1:3"]')).parallel
    assert [part.experts_in(1) for part in hot.parts(spec)] == [(0, 1, 3), (2, 3)]
    for word in ("1:4", "0:1"):
        wrong = ParallelConfig(ep=2, hot=(word,))
        with pytest.raises(LayoutError, match=f'parallel.hot="{word}" names no expert'):
            wrong.parts(spec)


def test_where_the_edge_may_listen() -> None:
    for words in (
        ["edge.host=127.0.0.1"],
        ["edge.host=localhost"],
        ["edge.host=::1"],
        ["edge.host=0.0.0.0", "edge.insecure=true"],
        ["edge.host=0.0.0.0", "edge.tls_cert=c", "edge.tls_key=k"],
    ):
        assert read_config(options("checkpoint=a", *words)).edge.wanted_port is None
    assert read_config(options("checkpoint=a", "edge.port=9443")).edge.wanted_port == 9443


def test_edge_only_has_the_usual_port_and_leaves_ray_serves_alone() -> None:
    config = read_config(options("checkpoint=a", "--edge-only"))
    assert (config.edge.only, config.edge.wanted_port) == (True, 9443)
    config = read_config(options("checkpoint=a", "--edge-only", "edge.port=9000"))
    assert config.edge.wanted_port == config.grpc_port == 9000


def test_the_edges_files_start_at_the_config_files_folder(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'checkpoint = "run"\n[edge]\ntls_cert = "c.pem"\ntls_key = "/k.pem"\n'
        '[auth]\nkeys = "keys.txt"\n'
    )
    config = read_config(options(str(file)))
    assert config.edge.tls_cert == tmp_path / "c.pem"
    assert config.edge.tls_key == Path("/k.pem")
    assert config.auth.keys == tmp_path / "keys.txt"
