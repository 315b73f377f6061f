"""Which weights can take the place of others."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptmoe.checkpoint import save, whole
from gptmoe.config import Uri, to_dict
from gptmoe.errors import RequestError
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import load_tokenizer, train_jiebabpe
from serve.checkpoints import Interchangeable
from serve.controller import Settings
from serve.refusals import NotWithThis
from serve.replica import Generator
from serve.service import Service
from tests.bucket import serving

SPEC = ModelSpec(num_layers=1, d_model=8, num_heads=1, d_ff=16, vocab_size=320, max_seq_len=16)

Save = Callable[..., Path]


def save_model(run: Path, spec: ModelSpec = SPEC, text: str = "春风又绿江南岸") -> Path:
    network = GPT(spec)
    initialize(network, seed=1)
    folder = run / "checkpoints" / "step-00000001"
    folder.parent.mkdir(parents=True)
    save(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(n, p.detach()) for n, p in network.named_parameters()]},
        config={"model": to_dict(spec)},
        progress={"step": 1},
        copy_files=train_jiebabpe([text] * 4, vocab_size=270).save,
    )
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Interchangeable:
    folder = save_model(tmp_path / "served")
    return Interchangeable(SPEC, load_tokenizer(folder).digest, tmp_path / "cache")


def test_of_a_run_the_newest_checkpoint_is_meant(served: Interchangeable, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "next")
    assert served.check(str(tmp_path / "next")) == served.check(str(folder)) == str(folder)


def test_a_uri_is_fetched_and_named_as_it_is(
    served: Interchangeable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "there" / "run")
    with serving(tmp_path / "there", monkeypatch) as bucket:
        found = served.check(bucket.uri("run"))
        assert found == Uri(bucket.uri("run/checkpoints/step-00000001"))
    assert list((tmp_path / "cache").iterdir())


def test_another_model_does_not_go_with_this_application(
    served: Interchangeable, tmp_path: Path
) -> None:
    wider = ModelSpec(**{name: getattr(SPEC, name) for name in to_dict(SPEC)} | {"d_model": 16})
    other = save_model(tmp_path / "wider", wider)
    with pytest.raises(NotWithThis, match="model of another config than the one that is served"):
        served.check(str(other))
    foreign = save_model(tmp_path / "foreign", text="白日依山尽，黄河入海流")
    with pytest.raises(NotWithThis, match="model of another tokenizer"):
        served.check(str(foreign))


def test_what_is_no_checkpoint_is_an_invalid_argument(
    served: Interchangeable, tmp_path: Path
) -> None:
    damaged = save_model(tmp_path / "damaged")
    weights = next(damaged.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for wanted, sentence in (
        ("", "absolute path or a URI; found ''"),
        ("runs/a", "absolute path or a URI; found 'runs/a'"),
        (str(tmp_path / "nowhere"), "nowhere"),
        (str(damaged), weights.name),
        ("nope://a/b", "nope"),
        ("/" + "a" * 5000, "name too long"),
        ("长" * 5000, "absolute path"),
    ):
        with pytest.raises(RequestError, match=sentence) as refusal:
            served.check(wanted)
        assert "\n" not in str(refusal.value)
        assert refusal.value.field == "checkpoint"


@pytest.mark.parametrize("error", [OSError(36, "File name too long"), TimeoutError()])
def test_a_replica_that_cannot_take_others_goes_on_with_its_own(
    service: Service, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def check(wanted: str) -> str:
        raise error

    replica = object.__new__(Generator)
    replica._version, replica.service, replica._stack = 0, service, ExitStack()
    replica._claims = SimpleNamespace(start=lambda: None)
    replica._core, replica._alike = SimpleNamespace(engine=None), SimpleNamespace(check=check)
    asyncio.run(replica.reconfigure(asdict(Settings(checkpoint="/b", version=1))))
    assert "weights stay version=0" in caplog.text
    assert service.version == 0
