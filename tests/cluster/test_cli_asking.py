"""gptmoe score, tokenize and abort against a server, and the options of gptmoe generate."""

import json
from collections.abc import Iterator
from concurrent import futures
from dataclasses import fields
from typing import Any

import grpc
import pytest
import typer
from typer.testing import CliRunner

from cluster.cli.sampling import OPTIONS, with_sampling
from gptmoe.errors import GptMoeError
from gptmoe.generate.params import SamplingParams
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services

from .conftest import Run


class Server(services.GenerationServicer):
    """Scores a text by its length."""

    def Score(self, request: Any, context: Any) -> Any:
        scored = [
            messages.Scored(token_ids=[1], logprobs=[-len(text)], logprob=-len(text))
            for text in request.continuations
        ]
        return messages.ScoreResponse(scores=scored)

    def Tokenize(self, request: Any, context: Any) -> Any:
        return messages.TokenizeResponse(token_ids=[7, 8], tokens=list(request.text))

    def Abort(self, request: Any, context: Any) -> Any:
        if request.request_id != "mine":
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"no request {request.request_id!r} is running"
            )
        return messages.AbortResponse()


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    running = grpc.server(futures.ThreadPoolExecutor(4))
    services.add_GenerationServicer_to_server(Server(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(None).wait(5)


def test_the_likeliest_continuation_is_first(run: Run, target: str) -> None:
    words = ["score", "春", "--continuation", "风又绿", "--continuation", "风", "--target", target]
    assert run(*words) == (0, "    -1.000  风\n    -3.000  风又绿\n", "")
    _, out, _ = run(*words, "--json")
    assert [row["continuation"] for row in json.loads(out)] == ["风", "风又绿"]
    assert json.loads(out)[0] | {"continuation": ""} == {
        "continuation": "",
        "token_ids": [1],
        "logprobs": [-1.0],
        "logprob": -1.0,
        "greedy": False,
    }


def test_tokens_are_shown(run: Run, target: str) -> None:
    assert run("tokenize", "春风", "--target", target) == (0, "7:春  8:风\n", "")
    _, out, _ = run("tokenize", "春风", "--target", target, "--json")
    assert json.loads(out) == {"token_ids": [7, 8], "texts": ["春", "风"]}


def test_a_request_is_aborted(run: Run, target: str) -> None:
    assert run("abort", "mine", "--target", target) == (0, "", "")
    code, out, err = run("abort", "gone", "--target", target)
    assert (code, out, err) == (2, "", "error: no request 'gone' is running\n")


def sampled(*words: str) -> SamplingParams:
    """What `generate` would get of these words."""
    got: list[SamplingParams] = []
    app = typer.Typer()

    @app.command()
    @with_sampling
    def command(prompt: str, *, sampling: SamplingParams) -> None:
        assert prompt == "春"
        got.append(sampling)

    done = CliRunner().invoke(app, ["春", *words])
    if isinstance(done.exception, GptMoeError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return got[0]


def test_options_are_those_of_sampling() -> None:
    known = {field.name for field in fields(SamplingParams)}
    answered = {"n", "logprobs", "top_logprobs", "prompt_logprobs"}  # more than one text
    assert set(OPTIONS) == known - answered
    assert sampled() == SamplingParams()
    words = (
        "--temperature 0 --num-beams 4 --stop 。 --stop ， --stop-token-id 5 --logit-bias 3=-1.5"
    )
    assert sampled(*words.split(), "--ignore-end") == SamplingParams(
        temperature=0,
        num_beams=4,
        stop=("。", "，"),
        stop_token_ids=(5,),
        logit_bias=((3, -1.5),),
        ignore_end=True,
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--logit-bias", "3"], "--logit-bias 3 is not of the form TOKEN=NUMBER, as 42=-1.5"),
        (["--min-p", "2"], "min_p must be between 0"),
    ],
)
def test_wrong_options_are_named(words: list[str], sentence: str) -> None:
    with pytest.raises(GptMoeError, match=sentence):
        sampled(*words)
