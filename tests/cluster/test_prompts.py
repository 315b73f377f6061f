"""Files of prompts and answers."""

import json
from pathlib import Path

import pytest

from cluster import prompts
from gptmoe.errors import ClusterError, DataError
from gptmoe.generate.params import SamplingParams


def test_prompts_in_answers_out(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('[{"id": 1, "txt": "春风"}, {"id": "b", "txt": "明月"}]')
    items = prompts.read(tmp_path / "in.json")
    rows = prompts.answers(items, ["又绿", "何时"], "poetry")
    prompts.write(rows, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"id": 1, "prompt": "春风", "output_poetry": "春风又绿"},
        {"id": "b", "prompt": "明月", "output_poetry": "明月何时"},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]


def test_an_item_may_have_as_many_new_tokens_as_it_wants(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(
        '[{"id": 1, "txt": "春风", "max_new_tokens": 7}, {"id": 2, "txt": "明月"}]'
    )
    common = SamplingParams(max_new_tokens=30, seed=4)
    sampling = [item.sampling(common) for item in prompts.read(tmp_path / "in.json")]
    assert sampling == [SamplingParams(max_new_tokens=7, seed=4), common]


def test_without_a_file_answers_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    prompts.write([{"id": 1}], None)
    assert json.loads(capsys.readouterr().out) == [{"id": 1}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe", "is not JSON in UTF-8"),
        (b"[{", "is not JSON in UTF-8"),
        (b"{}", "must hold a list of prompts"),
        (b"[]", "must hold a list of prompts"),
        (b'["x"]', 'item 1 must be an object with "id" and "txt"'),
        (b'[{"id": 1, "txt": "x"}, {"id": 2}]', 'item 2 must be an object with "id" and "txt"'),
        (b'[{"id": 1, "txt": ""}]', 'item 1: "txt" must be a text of at least one character'),
        (b'[{"id": 1, "txt": 5}]', 'item 1: "txt" must be a text'),
        (
            b'[{"id": 1, "txt": "x", "max_new_tokens": 0}]',
            'item 1: "max_new_tokens" must be a whole number of at least 1; found 0; leave it out',
        ),
        (b'[{"id": 1, "txt": "x", "max_new_tokens": true}]', "at least 1; found True"),
        (b'[{"id": 1, "txt": "x", "max_new_tokens": null}]', "at least 1; found None"),
        (
            b'[{"id": 1, "txt": "x", "max_new_token": 3}]',
            "item 1: 'max_new_token' is not known; an item has id, txt, max_new_tokens",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "in.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        prompts.read(tmp_path / "in.json")
    assert str(tmp_path / "in.json") in str(caught.value)
    assert expected in str(caught.value)


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json cannot be read: No such file"):
        prompts.read(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"out\.json cannot be written: No such file"):
        prompts.write([], tmp_path / "nothing" / "out.json")
    for path in (tmp_path / "nothing" / "out.json", tmp_path):
        with pytest.raises(DataError, match="cannot be written; name a file in a folder"):
            prompts.check_writable(path)
    prompts.check_writable(tmp_path / "out.json")


def test_a_prompt_without_an_answer_says_why() -> None:
    items = [prompts.Item(1, "春风"), prompts.Item(2, "明月")]
    assert prompts.answers(items, ["又绿", ClusterError("it is away")], "text") == [
        {"id": 1, "prompt": "春风", "output_text": "春风又绿"},
        {"id": 2, "prompt": "明月", "error": "it is away"},
    ]
