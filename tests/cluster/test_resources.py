"""What is missing, in words."""

from cluster.resources import missing


def test_missing_resources_in_words() -> None:
    assert missing({"CPU": 4, "GPU": 2}, {"CPU": 3.0}) == "1 of 4 CPU, 2 of 2 GPU"
    assert missing({"CPU": 4}, {"CPU": 4.0, "GPU": 1.0}) == ""
