"""The DAGs as Airflow parses them, without a database: names, order, mapping, params, imports."""

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError

from tests.airflow.conftest import DAGS, ROOT


@pytest.fixture(scope="module")
def dags() -> dict[str, Any]:
    bag = DagBag(DAGS)
    assert bag.import_errors == {}
    return bag.dags


def test_there_are_two_dags(dags: dict[str, Any]) -> None:
    assert set(dags) == {"distill", "retrain"}


def test_distill_in_order(dags: dict[str, Any]) -> None:
    edges = {task.task_id: task.downstream_task_ids for task in dags["distill"].tasks}
    assert edges == {
        "plan": {"dump"},
        "dump": {"finalize"},
        "finalize": {"verify"},
        "verify": {"hosts"},
        "hosts": {"train"},
        "train": {"evaluate"},
        "evaluate": {"gate"},
        "gate": set(),
    }


def test_retrain_in_order(dags: dict[str, Any]) -> None:
    edges = {task.task_id: task.downstream_task_ids for task in dags["retrain"].tasks}
    assert edges == {
        "grid": {"train"},
        "train": {"evaluate", "choose"},
        "evaluate": {"choose"},
        "choose": set(),
    }


def test_gpu_tasks_wait_for_a_gpu(dags: dict[str, Any]) -> None:
    """A machine that only dumps takes the queue `gpu`, and needs no shared folder."""
    queues = {"dump": "gpu", "train": "train", "evaluate": "train"}
    for dag in dags.values():
        for task in dag.tasks:
            queue = queues.get(task.task_id)
            expected = ("gpu", queue) if queue else ("default_pool", "default")
            assert (task.pool, task.queue) == expected, task.task_id
            assert task.pool_slots == 1


def test_mapped_tasks_have_names_and_retries(dags: dict[str, Any]) -> None:
    for dag, name in [("distill", "dump"), ("distill", "train"), ("retrain", "train")]:
        task = dags[dag].get_task(name)
        assert task.is_mapped
        assert "op_kwargs" in task.map_index_template
        assert task.retries == 5
    for dag in dags.values():
        assert all(task.retries >= 2 and task.execution_timeout for task in dag.tasks)


def test_assets(dags: dict[str, Any]) -> None:
    def outlets(dag: str, task: str) -> list[str]:
        return [asset.name for asset in dags[dag].get_task(task).outlets]

    assert outlets("distill", "verify") == ["mol_distill_dump"]
    assert outlets("distill", "evaluate") == ["mol_distill_student"]
    assert outlets("retrain", "choose") == ["mol_distill_student"]
    assert "mol_distill_dump" in str(dags["retrain"].timetable.asset_condition)


def test_a_new_dump_costs_nothing_until_retrain_is_switched_on(dags: dict[str, Any]) -> None:
    assert dags["distill"].is_paused_upon_creation is False
    assert dags["retrain"].is_paused_upon_creation is not False


def test_every_param_explains_itself(dags: dict[str, Any]) -> None:
    for dag in dags.values():
        for name in dag.params:
            param = dag.params.get_param(name)
            assert param.description, name
            assert {"type", "title", "section"} <= set(param.schema), name


@pytest.mark.parametrize(
    ("dag", "name", "value"),
    [
        ("distill", "partitions", 0),
        ("distill", "partitions", 1025),
        ("distill", "partitions", 2.5),
        ("distill", "k", 65536),
        ("distill", "positions", 0),
        ("distill", "positions", 1.5),
        ("distill", "max_length", 1),
        ("distill", "alpha", -0.1),
        ("distill", "learning_rate", 0),
        ("distill", "max_kl", -1),
        ("distill", "hosts", 0),
        ("distill", "hosts", 1.5),
        ("distill", "model", ""),
        ("distill", "overrides", ["traim.mix=2"]),
        ("distill", "overrides", ["train.mix"]),
        ("distill", "overrides", ["train.mix=1\n"]),
        ("distill", "overrides", ["train.mix=1\n--summary=/etc/x"]),
        ("distill", "overrides", ["dump.config=other.yaml"]),
        ("distill", "overrides", ["train.summary=/etc/x"]),
        ("distill", "overrides", ["train.training.hub_token=hf_a"]),
        ("distill", "overrides", ["train.domain.path=s3://key:word@bucket/x"]),
        ("distill", "dump", "s3://key:word@bucket/dump"),
        ("distill", "corpus", "https://host/c.jsonl?X-Amz-Signature=a"),
        ("retrain", "alphas", []),
        ("retrain", "alphas", [1, -1]),
        ("retrain", "learning_rates", [0.001, 0.001]),
        ("retrain", "learning_rates", ["fast"]),
    ],
)
def test_params_out_of_range(dags: dict[str, Any], dag: str, name: str, value: object) -> None:
    with pytest.raises(ParamValidationError):
        dags[dag].params.get_param(name).resolve(value)


def test_params_in_range(dags: dict[str, Any]) -> None:
    lines = ["train.training.include_num_input_tokens_seen=no", "dump.engine_args.x={'a': 1}"]
    dags["distill"].params.get_param("overrides").resolve(lines)
    for place in ("s3://bucket/dump", "runs/a@b", "hf://datasets/me/text@main", "https://h/x?v=1"):
        dags["distill"].params.get_param("dump").resolve(place)


def test_default_params_are_valid_and_their_configs_exist(dags: dict[str, Any]) -> None:
    for dag in dags.values():
        for name, value in dag.params.validate().items():
            if name.endswith("_config"):
                assert (ROOT / value).is_file()


def test_dags_import_only_the_standard_library_and_airflows_sdk() -> None:
    own = {file.stem for file in DAGS.glob("*.py")}
    for file in DAGS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                root = name.split(".")[0]
                assert (
                    root in sys.stdlib_module_names
                    or root in own
                    or name == "airflow.sdk"
                    or name.startswith("airflow.sdk.")
                ), f"{file.name} imports {name}"


BASE = {"general_perplexity": 10.0, "kl_to_base": 0.0}
BOUNDS = {"max_general_ratio": 1.2, "max_kl": 0.1}


@pytest.mark.parametrize(
    ("perplexity", "kl", "broken"),
    [
        (12.0, 0.1, []),
        (12.1, 0.1, ["perplexity"]),
        (9.0, 0.11, ["KL"]),
        (13.0, 0.2, ["perplexity", "KL"]),
        (float("nan"), 0.0, ["perplexity"]),
        ("NaN", 0.0, ["perplexity"]),  # as JSON has it
        (11.0, "Infinity", ["kl_to_base"]),
    ],
)
def test_gate(perplexity: Any, kl: Any, broken: list[str]) -> None:
    from distill import faults

    student = {"general_perplexity": perplexity, "kl_to_base": kl}
    lines = faults(student, BASE, BOUNDS)
    assert len(lines) == len(broken)
    assert all(word in line for word, line in zip(broken, lines, strict=True))
    unbounded = faults(student, BASE, {"max_general_ratio": None, "max_kl": None})
    assert unbounded == [line for line in lines if "diverged" in line]


def test_gate_of_a_base_that_diverged() -> None:
    from distill import faults

    student = {"general_perplexity": 9.0, "kl_to_base": 0.0}
    assert faults(student, BASE | {"general_perplexity": "Infinity"}, BOUNDS)


def test_gate_without_general_text_says_so() -> None:
    from distill import faults

    with pytest.raises(AirflowFailException, match=r"general\.path"):
        faults({"domain_perplexity": 3.0}, {"domain_perplexity": 4.0}, BOUNDS)


def test_helpers_are_not_parsed_as_dags() -> None:
    ignored = Path(DAGS, ".airflowignore").read_text().split("\n")
    assert {file.name for file in DAGS.glob("distill_*.py")} <= set(ignored)
