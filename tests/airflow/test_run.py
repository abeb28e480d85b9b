"""Whole runs in one process (dag.test), with the real scripts and the project's interpreter."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError

from tests.airflow.conftest import DAGS

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture(scope="module")
def dags() -> dict[str, Any]:
    return DagBag(DAGS).dags


def states(run: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for ti in run.get_task_instances():
        found.setdefault(ti.task_id, []).append(str(ti.state))
    return found


def pulled(run: Any, task: str, key: str = "return_value") -> Any:
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session

    with create_session() as session:
        query = XComModel.get_many(key=key, task_ids=task, dag_ids=run.dag_id, run_id=run.run_id)
        return [XComModel.deserialize_value(row) for row in session.scalars(query)]


@pytest.fixture(scope="module")
def distilled(dags: dict[str, Any], params: dict[str, object]) -> Any:
    return dags["distill"].test(
        run_conf={
            **params,
            "dump": "four",
            "student": "student",
            "partitions": 4,
            "alpha": 0.5,
            "max_kl": 0.1,
        }
    )


def test_distill_ends_green(distilled: Any) -> None:
    assert states(distilled) == {
        "plan": ["success"],
        "dump": ["success"] * 4,
        "finalize": ["success"],
        "verify": ["success"],
        "hosts": ["success"],
        "train": ["success"],
        "evaluate": ["success"],
        "gate": ["success"],
    }


def test_four_partitions_give_the_rows_of_the_reference(
    distilled: Any, world: Path, rows: Callable[[Path], dict[str, str]], reference: dict[str, str]
) -> None:
    assert rows(world / "four") == reference


def test_summaries_are_pushed(distilled: Any) -> None:
    [plan] = pulled(distilled, "plan", "summary")
    assert plan["partitions"] == 4
    [dump] = pulled(distilled, "verify")
    assert {"rows", "tokens", "bytes_per_token", "kept_mass"} <= set(dump)
    assert sum(part["tokens"] for part in pulled(distilled, "dump")) == dump["tokens"]
    [student] = pulled(distilled, "train")
    assert (student["student"], student["steps"]) == ("student/model", 4)
    [models] = pulled(distilled, "evaluate")
    assert models["student"]["kl_to_base"] > models["base"]["kl_to_base"] == 0


def test_a_second_run_dumps_nothing(dags: dict[str, Any], distilled: Any) -> None:
    """With a bound that no student meets, only the gate fails."""
    run = dags["distill"].test(run_conf={**distilled.conf, "max_kl": 0.0})
    found = states(run)
    assert found.pop("gate") == ["failed"]
    assert {state for part in found.values() for state in part} == {"success"}
    assert all("tokens_per_s" in part for part in pulled(distilled, "dump"))
    assert not any("tokens_per_s" in part for part in pulled(run, "dump"))  # no engine ran


@pytest.mark.parametrize("setting", [{"k": 5}, {"positions": 0.5}])
def test_another_plan_is_refused_without_a_retry(
    dags: dict[str, Any], distilled: Any, setting: dict[str, Any]
) -> None:
    run = dags["distill"].test(run_conf={**distilled.conf, **setting})
    [plan] = [ti for ti in run.get_task_instances() if ti.task_id == "plan"]
    assert (str(plan.state), plan.try_number) == ("failed", 1)
    assert states(run)["dump"] == ["upstream_failed"]


def test_a_python_that_is_not_the_projects_is_refused(
    dags: dict[str, Any], params: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_VAR_MOL_DISTILL_PYTHON", sys.executable)  # Airflow's own
    run = dags["distill"].test(run_conf=params)
    [plan] = [ti for ti in run.get_task_instances() if ti.task_id == "plan"]
    assert (str(plan.state), plan.try_number) == ("failed", 1)


def test_retrain_by_hand(
    dags: dict[str, Any], distilled: Any, params: dict[str, object], world: Path
) -> None:
    given = {key: value for key, value in params.items() if key != "dump_config"}
    run = dags["retrain"].test(
        run_conf={
            **given,
            "dump": "four",
            "students": "students",
            "alphas": [0.5, 2],
            "learning_rates": [0.0001],
            "max_kl": None,
            "overrides": ["train.training.max_steps=2"],
        }
    )
    assert states(run) == {
        "grid": ["success"],
        "train": ["success"] * 2,
        "evaluate": ["success"],
        "choose": ["success"],
    }
    names = {ti.rendered_map_index for ti in run.get_task_instances() if ti.task_id == "train"}
    assert names == {f"alpha {alpha}, learning rate 0.0001" for alpha in ("0.5", "2")}
    [best] = pulled(run, "choose")
    assert best["name"] in names
    assert best["steps"] == 2
    assert (world / best["student"] / "config.json").is_file()


def test_params_out_of_range_start_nothing(dags: dict[str, Any]) -> None:
    with pytest.raises(ParamValidationError, match="partitions"):
        dags["distill"].test(run_conf={"partitions": 5000})
