"""gptmoe plan from outside: quick, light, and one sentence for a wrong input."""

import json
import resource
import subprocess
import sys
from typing import Any

import pytest

from cluster import env
from cluster.cli import lazy, planning
from cluster.cli.plan_drawing import MEMORY, TIME
from cluster.planner.memory import Memory
from cluster.planner.step_time import StepTime
from cluster.resolve import resolve
from gptmoe.errors import ConfigError
from gptmoe.parallel.layout import Layout

QUOTED = ["--model", "1.3B+MoE-64", "--devices", "8", "--device-memory-gb", "80"]


def gptmoe(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "plan", *words]
    return subprocess.run(command, cwd=env.ROOT, capture_output=True, text=True, timeout=60)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_quoted_command_answers_in_under_two_seconds() -> None:
    began_s = cpu_s()
    done = gptmoe(*QUOTED, "--json")
    assert done.returncode == 0, done.stderr
    assert cpu_s() - began_s < 2.0
    facts = json.loads(done.stdout)
    layout = Layout(**facts["layout"])
    assert set(facts["layout"]) == {"dp", "tp", "ep", "pp"}
    assert layout.world == facts["world"] <= 8
    memory, time = facts["memory_bytes"], facts["step_time_s"]
    assert memory["total"] <= facts["usable_bytes"] < 80e9
    for items in (memory, time):
        assert items["total"] == pytest.approx(sum(items.values()) - items["total"])
    assert facts["tokens_per_s"] == pytest.approx(facts["batch_tokens"] / time["total"])
    assert all(row["reason"] for row in facts["runners_up"])
    assert f"parallel.ep={layout.ep}" in facts["overrides"]


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['gptmoe', 'plan', *sys.argv[1:]]\n"
        "from cluster.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'ray', 'numpy', 'requests'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *QUOTED, "--json"]
    done = subprocess.run(command, cwd=env.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")


def test_tables_for_people() -> None:
    done = gptmoe("--model", "1.3B+MoE-64", "--devices", "64", "--pp", "4", "--zero", "1")
    assert done.returncode == 0, done.stderr
    for word in ("microbatch_size=", "master copy", "all-to-all", "bubble", "not chosen, of"):
        assert word in done.stdout
    assert "gptmoe pretrain CONFIG parallel.dp=" in done.stdout


def test_a_config_file_with_its_tokenizer() -> None:
    words = ["--model", "configs/train/demo.toml", "--devices", "3", "--device", "cpu", "--json"]
    facts = json.loads(gptmoe(*words).stdout)
    assert (facts["batch_tokens"], facts["dtype"]) == (4096, "float32")
    assert facts["idle_devices"] == 3 - facts["world"]


@pytest.mark.parametrize("devices", ["2", "4"])
def test_training_accepts_what_is_planned(devices: str) -> None:
    config = "configs/train/tiny.toml"
    facts = json.loads(gptmoe("--model", config, "--devices", devices, "--json").stdout)
    resolved = resolve("pretrain", env.ROOT / config, facts["overrides"])
    assert resolved.workers == facts["world"]
    pipeline = gptmoe("--model", config, "--devices", devices, "--pp", "2", "--json").stdout
    assert resolve("pretrain", env.ROOT / config, json.loads(pipeline)["overrides"]).workers > 1


def test_equal_cost_for_people_and_as_json() -> None:
    words = ["--model", "0.125B", "--devices", "8", "--equal-cost"]
    facts = json.loads(gptmoe(*words, "--json").stdout)
    assert facts["most_parameters"]["parameters"] > facts["parameters"]
    text = gptmoe(*words).stdout
    assert "for about its cost per token or less" in text
    assert facts["most_parameters"]["model"] in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "1.3B"], "error: plan wants to know what it plans for: give --devices N"),
        (["--model", "1.4B", "--devices", "8"], "error: model.preset='1.4B' is not known"),
        (["--model", "1.3B+MoE-64", "--devices", "1"], "error: not enough memory on 1 x a100"),
        (["--model", "1.3B", "--devices", "8", "--tp", "3"], "error: parallel.tp=3 must divide"),
        (["--model", "no.toml", "--devices", "8"], "error: config file no.toml does not exist"),
        (["--model", "1.3B", "--devices", "8", "--device", "x"], "error: --device x is not known"),
        (["--model", "1.3B", "--devices", "9999"], "should be less than or equal to 4096"),
    ],
    ids=lambda value: " ".join(value)[8:] if isinstance(value, list) else "",
)
def test_a_wrong_input_is_one_sentence(words: list[str], expected: str) -> None:
    done = gptmoe(*words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_every_item_is_explained() -> None:
    assert list(MEMORY) == list(Memory.__dataclass_fields__)
    assert list(TIME) == list(StepTime.__dataclass_fields__)


class FakeDashboard:
    """A Ray cluster that declares these resources."""

    def __init__(self, resources: dict[str, float]) -> None:
        self.found = resources

    def Dashboard(self, address: str) -> Any:
        return self

    def resources(self) -> dict[str, float]:
        return self.found


def test_devices_of_a_running_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    here = FakeDashboard({"CPU": 4.0, "memory": 8e9, "node:a": 1.0, "node:b": 1.0})
    monkeypatch.setattr(lazy, "dashboard", lambda: here)
    cluster = planning.make_cluster(None, "", "http://head:8265")
    assert (cluster.num_devices, cluster.devices_per_node) == (4, 2)
    assert cluster.device.memory_bytes == 2e9
    assert planning.make_cluster(2, "cpu", "http://head:8265").num_devices == 2
    here.found = {"GPU": 4.0, "node:a": 1.0}
    with pytest.raises(ConfigError, match="does not say what its 4 devices are; name them with --"):
        planning.make_cluster(None, "", "http://head:8265")


def test_the_command_line_describes_devices() -> None:
    plain = planning.make_cluster(8, "h100-80gb", "")
    made = planning.described(plain, 40.0, 500.0, 4, 100.0, 10.0)
    assert (made.device.memory_bytes, made.device.bfloat16_flops_per_s) == (40e9, 500e12)
    assert (made.devices_per_node, made.link_bytes_per_s) == (4, 100e9)
    assert made.network_bytes_per_s == 10e9
    assert planning.described(plain, None, None, None, None, None) == plain
