"""gptmoe.errors: one tree, whose members cross processes unharmed."""

import pickle

import pytest

from gptmoe import errors
from gptmoe.errors import GptMoeError, Overloaded, RequestError

TREE = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("error_class", TREE)
def test_an_error_survives_pickling_and_says_its_message(error_class: type[GptMoeError]) -> None:
    error = pickle.loads(pickle.dumps(error_class("wanted a, found b; use c")))
    assert type(error) is error_class
    assert isinstance(error, GptMoeError)
    assert str(error) == "wanted a, found b; use c"


@pytest.mark.parametrize("error_class", TREE)
def test_every_error_is_drawn_in_the_tree(error_class: type[GptMoeError]) -> None:
    assert error_class.__name__ in (errors.__doc__ or "")
    assert error_class.__doc__


def test_a_request_error_keeps_the_field_to_change() -> None:
    error = pickle.loads(pickle.dumps(RequestError("top_k must be at least 0", "top_k")))
    assert (error.message, error.field) == ("top_k must be at least 0", "top_k")


def test_overloaded_keeps_when_to_come_back() -> None:
    assert pickle.loads(pickle.dumps(Overloaded("queue is full", 2.5))).retry_after_s == 2.5
