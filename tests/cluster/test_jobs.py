"""What a job needs, and URIs that are checked before it is sent. The jobs themselves: tests/ray."""

import threading
import time

import pytest

from cluster.jobs import Job, check_uri, room
from cluster.patience import left_behind
from gptmoe.config import Uri
from gptmoe.errors import ConfigError, DataError

URI = Uri("s3://bucket/poems.tsv")


def test_training_asks_for_gpus_where_there_are_any() -> None:
    job = Job(job_id="a", kind="pretrain", run_dir="/a", entrypoint="", workers=4)
    assert room(job, {"CPU": 8.0}) == {"CPU": 4.0}
    assert room(job, {"CPU": 8.0, "GPU": 1.0}) == {"CPU": 4.0, "GPU": 4.0}
    job = Job(job_id="a", kind="serve", run_dir="", entrypoint="", workers=4)
    assert room(job, {"CPU": 8.0, "GPU": 1.0}) == {"CPU": 4.0}


def test_a_uri_is_looked_at_for_a_while() -> None:
    release = threading.Event()

    def absent(uri: Uri) -> None:
        raise DataError(f"{uri} does not exist; check the address")

    def silent(uri: Uri) -> None:
        release.wait()

    assert check_uri("data.path", URI, lambda uri: None) == URI
    with pytest.raises(ConfigError, match=f"^data.path: {URI} does not exist; check the address$"):
        check_uri("data.path", URI, absent)
    with pytest.raises(
        ConfigError, match=rf"^data.path: {URI} does not answer within 0.01 s; check the address,"
    ):
        check_uri("data.path", URI, silent, timeout_s=0.01)
    release.set()
    while left_behind():
        time.sleep(0.001)
