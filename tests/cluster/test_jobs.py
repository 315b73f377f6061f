"""What a job needs. The jobs themselves: tests/ray."""

from cluster.jobs import Job, room


def test_training_asks_for_gpus_where_there_are_any() -> None:
    job = Job(job_id="a", kind="pretrain", run_dir="/a", entrypoint="", workers=4)
    assert room(job, {"CPU": 8.0}) == {"CPU": 4.0}
    assert room(job, {"CPU": 8.0, "GPU": 1.0}) == {"CPU": 4.0, "GPU": 4.0}
    job = Job(job_id="a", kind="serve", run_dir="", entrypoint="", workers=4)
    assert room(job, {"CPU": 8.0, "GPU": 1.0}) == {"CPU": 4.0}
