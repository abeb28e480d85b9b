"""The pipeline in Airflow 3: dump a base model, train a student, evaluate it, accept or reject it.

There are two DAGs. `distill`: plan → dump (one task per partition) → finalize → verify → train →
evaluate → gate. `retrain`: trains a grid of students from an existing dump, which is the purpose of
an offline dump. You start it by hand, or a new dump starts it.

Every task starts one of the project's scripts with the project's own interpreter, so this folder
needs only the standard library and airflow.sdk. One setting is mandatory, the Airflow Variable
`mol_distill_python`; deploy/README.md describes the setup of one machine and of many.
"""

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from distill_form import DUMPING, GATE, GRID, ONE_STUDENT, OVERRIDES, PLACES
from distill_hosts import meet
from distill_start import ROOT, Json, interpreter, start

PODS = ROOT / "deploy" / "kubernetes"
DUMP, STUDENT = Asset("mol_distill_dump"), Asset("mol_distill_student")


def options(stage: str, given: Json) -> list[str]:
    """--name=value for each value that is not None, then the overrides of the stage."""
    named = [f"--{name}={as_text(value)}" for name, value in given.items() if value is not None]
    more = [
        line.split(".", 1)[1]
        for line in settings()["overrides"] or []
        if line.startswith(f"{stage}.")
    ]
    return named + [f"--{option}" for option in more]


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def settings() -> Json:
    """The run's params. A run that a new dump started uses that dump's paths, not the form's."""
    context = get_current_context()
    found = dict(context["params"])
    triggers: Any = context.get("triggering_asset_events") or {}
    for event in triggers.get(DUMP) or []:
        found |= event.extra.get("settings", {})
    return found


def scalars(summary: Json) -> Json:
    """The numbers, texts and flags of a summary, without the identity."""
    return {
        name: value
        for name, value in summary.items()
        if isinstance(value, int | float | str) and name != "identity"
    }


def dump_script(*more: str, gpu: bool = False) -> Json:
    """Run scripts/dump_logits.py with the run's settings; returns its summary."""
    params = settings()
    given = {
        "model": params["model"],
        "output": params["dump"],
        "corpus.path": params["corpus"],
        "partitions": params["partitions"],
        "k": params["k"],
        "positions": params["positions"],
        "max_length": params["max_length"],
    }
    config = ["--config", str(ROOT / params["dump_config"]), "--summary", "{summary}"]
    script = str(ROOT / "scripts" / "dump_logits.py")
    return start([script, *config, *options("dump", given), *more], params["folder"], gpu=gpu)


def train_script(
    student: str, alpha: float | None, learning_rate: float | None, host: int = 0, hosts: int = 1
) -> Json:
    """Run scripts/train_student.py; returns its summary without the run's identity.

    This task is one of `hosts` that train together; each has a number.
    """
    params = settings()
    given = {
        "model": params["model"],
        "dump": params["dump"],
        "output": student,
        "domain.path": params["domain"],
        "loss.alpha": alpha,
        "training.learning_rate": learning_rate,
    }
    config = ["--config", str(ROOT / params["train_config"]), "--summary", "{summary}"]
    script, alone = ["train_student.py"], student
    if hosts > 1:
        numbers = [f"--hosts={hosts}", f"--host={host}", f"--endpoint={meet(host)}"]
        script, alone = ["train_hosts.py", *numbers, "--"], f"{student}/host-{host}"
    script[0] = str(ROOT / "scripts" / script[0])
    command = [*script, *config, *options("train", given)]
    found = scalars(start(command, params["folder"], gpu=True, alone=alone))
    return {"student": f"{student}/model", **found}


def evaluate_script(students: dict[str, str], results: str) -> dict[str, Json]:
    """Run scripts/evaluate.py.

    Returns {model: {domain_perplexity, general_perplexity, kl_to_base}}.
    """
    params = settings()
    given = {
        "models": {"base": params["model"], **students},
        "base": "base",
        "output": results,
    }
    config = ["--config", str(ROOT / params["evaluate_config"]), "--summary", "{summary}"]
    command = [str(ROOT / "scripts" / "evaluate.py"), *config, *options("evaluate", given)]
    found = start(command, params["folder"], gpu=True)
    return {name: scalars(model) for name, model in found["models"].items()}


def faults(student: Json, base: Json, params: Json) -> list[str]:
    """One line for each number that is not finite (a text in JSON), and for each bound that the
    student breaks; none if it is accepted.

    Raises AirflowFailException if there is no measurement for a bound.
    """
    bounds = {
        "general perplexity, times the base's": (params["max_general_ratio"], "general_perplexity"),
        "KL to the base on general text in nats": (params["max_kl"], "kl_to_base"),
    }
    lines = [
        f"{who}'s {name}: {model[name]}, the model diverged"
        for who, model in (("student", student), ("base", base))
        for name in ("domain_perplexity", "general_perplexity", "kl_to_base")
        if not math.isfinite(float(model.get(name, 0)))
    ]
    if lines:
        return lines
    for name, (bound, key) in bounds.items():
        if bound is None:
            continue
        if key not in student:
            raise AirflowFailException(
                f"the gate bounds {name}, but nothing was measured on general text: set "
                "general.path in the evaluation's config, or clear the bound"
            )
        value = float(student[key]) / (float(base[key]) if key == "general_perplexity" else 1)
        if not value <= bound:  # NaN breaks the bound, too
            lines.append(f"{name}: {value:.4g}, the bound is {bound:g}")
    return lines


# Each of these tasks holds a GPU: a slot of the pool `gpu`, a worker of a Celery queue, or a
# Kubernetes pod with a GPU. An executor ignores the settings that it does not know. A dump needs no
# shared folder, so its queue is one of its own; students are in the working folder.
ON_GPU: Json = {
    "pool": "gpu",
    "queue": "gpu",
    "executor_config": {"pod_template_file": str(PODS / "gpu.yaml")},
}
ON_FOLDER: Json = {**ON_GPU, "queue": "train"}
ON_CPU: Json = {"executor_config": {"pod_template_file": str(PODS / "cpu.yaml")}}
DEFAULTS: Json = {
    "retries": 2,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": 2,
    "max_retry_delay": timedelta(minutes=10),
    "execution_timeout": timedelta(hours=12),
}
# Dump and train resume where the last try stopped, so they may take long and have many tries.
LONG: Json = {"retries": 5, "execution_timeout": timedelta(days=3)}


@dag(
    dag_id="distill",
    dag_display_name="Distill: dump, train, evaluate",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    is_paused_upon_creation=False,
    default_args=DEFAULTS,
    params={**PLACES, **DUMPING, **ONE_STUDENT, **GATE, **OVERRIDES},
    tags=["mol-distill"],
)
def distill() -> None:
    @task(**ON_CPU)
    def plan() -> list[str]:
        """Write plan.json, or check that the existing one is equal; returns I/N per partition."""
        params = settings()
        check = "import storage, pipeline.config"
        try:
            start(["-c", check], params["folder"])
        except AirflowFailException:
            raise
        except AirflowException as error:
            raise AirflowFailException(
                f"mol_distill_python: {interpreter()} is not the project's environment ({error}); "
                "`make setup` creates it"
            ) from error
        summary = dump_script("--only=plan")
        get_current_context()["ti"].xcom_push("summary", summary)
        return [f"{index}/{params['partitions']}" for index in range(params["partitions"])]

    @task(**ON_GPU, **LONG, map_index_template="partition {{ task.op_kwargs['partition'] }}")
    def dump(partition: str) -> Json:
        """Dump the base model's top-k over one partition."""
        return scalars(dump_script(f"--partition={partition}", gpu=True))

    @task(**ON_CPU)
    def finalize() -> Json:
        """Write manifest.json after every partition is complete."""
        return scalars(dump_script("--only=finalize"))

    @task(**ON_CPU, outlets=[DUMP])
    def verify(summary: Json) -> Json:
        """Read every byte again and decode every row; only then announce the new dump."""
        params = settings()
        start(["-m", "storage", "verify", "--", params["dump"]], params["folder"])
        places = {name: params[name] for name in [*PLACES, *OVERRIDES]}
        get_current_context()["outlet_events"][DUMP].extra = {**summary, "settings": places}
        return summary

    @task(**ON_CPU)
    def hosts() -> list[int]:
        """The numbers of the hosts that train together."""
        return list(range(settings()["hosts"]))

    @task(**ON_FOLDER, **LONG, map_index_template="host {{ task.op_kwargs['host'] }}")
    def train(host: int) -> Json:
        """Train with cross-entropy on the domain and KL to the dump on the general corpus."""
        params = settings()
        given = params["student"], params["alpha"], params["learning_rate"]
        return train_script(*given, host, params["hosts"])

    @task(**ON_FOLDER, outlets=[STUDENT])
    def evaluate(trained: list[Json]) -> dict[str, Json]:
        """Measure perplexities of base and student on held-out text, and the KL between them."""
        summary = trained[0]
        get_current_context()["outlet_events"][STUDENT].extra = summary
        results = f"{settings()['student']}/evaluation.json"
        return evaluate_script({"student": summary["student"]}, results)

    @task(**ON_CPU)
    def gate(models: dict[str, Json]) -> Json:
        """Fail the run if the student lost more than the bounds allow."""
        broken = faults(models["student"], models["base"], settings())
        if broken:
            raise AirflowFailException(
                f"the student is rejected. {'; '.join(broken)}. A higher alpha, a lower "
                "learning rate or fewer steps forget less; the DAG `retrain` tries several."
            )
        return models["student"]

    # A call of a task returns a reference to its result, which only Airflow resolves: hence Any.
    dumped = dump.expand(partition=plan())
    finished: Any = finalize()
    verified: Any = verify(finished)
    numbers: Any = hosts()
    trained: Any = train.expand(host=numbers)
    models: Any = evaluate(trained)
    dumped >> finished
    verified >> numbers
    gate(models)


@dag(
    dag_id="retrain",
    dag_display_name="Retrain: a grid of students from one dump",
    doc_md=__doc__,
    schedule=[DUMP],
    catchup=False,
    default_args=DEFAULTS,
    params={**PLACES, **GRID, **GATE, **OVERRIDES},
    tags=["mol-distill"],
)
def retrain() -> None:
    @task(**ON_CPU)
    def grid() -> list[Json]:
        """One point for each pair of alpha and learning rate."""
        params = settings()
        folder = f"{params['students']}/{params['dump'].rstrip('/').rsplit('/', 1)[-1]}"
        return [
            {
                "name": f"alpha {alpha:g}, learning rate {rate:g}",
                "student": f"{folder}/alpha-{alpha:g}-lr-{rate:g}",
                "alpha": alpha,
                "learning_rate": rate,
            }
            for alpha in params["alphas"]
            for rate in params["learning_rates"]
        ]

    @task(**ON_FOLDER, **LONG, map_index_template="{{ task.op_kwargs['point']['name'] }}")
    def train(point: Json) -> Json:
        """Train one student from the dump; no teacher runs."""
        return {
            "name": point["name"],
            **train_script(point["student"], point["alpha"], point["learning_rate"]),
        }

    @task(**ON_FOLDER)
    def evaluate(trained: list[Json]) -> dict[str, Json]:
        """Evaluate all students against the base, in one table."""
        students = {point["name"]: point["student"] for point in trained}
        results = f"{Path(next(iter(students.values()))).parents[1]}/evaluation.json"
        return evaluate_script(students, results)

    @task(**ON_CPU, outlets=[STUDENT])
    def choose(trained: list[Json], models: dict[str, Json]) -> Json:
        """Choose the student with the lowest domain perplexity within the bounds."""
        params = settings()
        accepted = []
        for point in trained:
            found = models[point["name"]]
            broken = faults(found, models["base"], params)
            print(f"{point['name']}: {'; '.join(broken) or 'accepted'}; {json.dumps(found)}")
            if not broken:
                accepted.append({**point, **found})
        if not accepted:
            raise AirflowFailException(
                f"none of {len(trained)} students is within the bounds (see the lines above); "
                "try higher alphas, lower learning rates or wider bounds"
            )
        best = min(accepted, key=lambda point: point.get("domain_perplexity", 0.0))
        get_current_context()["outlet_events"][STUDENT].extra = best
        return best

    trained: Any = train.expand(point=grid())
    models: Any = evaluate(trained)
    choose(trained, models)


distill()
retrain()
