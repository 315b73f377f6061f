"""What is missing, in words."""

from cluster.resources import at_once, gpus_per_worker, missing, needed


def test_missing_resources_in_words() -> None:
    assert missing({"CPU": 4, "GPU": 2}, {"CPU": 3.0}) == "1 of 4 CPU, 2 of 2 GPU"
    assert missing({"CPU": 4}, {"CPU": 4.0, "GPU": 1.0}) == ""


def test_workers_take_a_gpu_each_if_the_cluster_has_any() -> None:
    assert gpus_per_worker({"CPU": 8.0}) == 0
    assert gpus_per_worker({"CPU": 8.0, "GPU": 2.0}) == 1
    assert needed(4, gpus_per_worker=1, spare_cpus=1) == {"CPU": 5.0, "GPU": 4.0}
    assert needed(4) == {"CPU": 4.0}


def test_as_many_workers_run_as_there_is_room_for_but_never_fewer_than_the_least() -> None:
    assert at_once(4, 4, {"CPU": 2.0}) == 4
    assert at_once(4, 1, {"CPU": 2.0}) == 2
    assert at_once(4, 1, {"CPU": 16.0}) == 4
    assert at_once(4, 1, {"CPU": 16.0, "GPU": 3.0}, gpus_per_worker=1) == 3
    assert at_once(4, 2, {}) == 2
