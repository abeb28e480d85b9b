"""The batch in Airflow 3: dump a base model, train a student, evaluate it, accept it or not.

Two DAGs. `distill`: plan → dump (one task for each partition) → finalize → verify → train →
evaluate → gate. `retrain`: students over a grid of settings from a dump that exists, started by
hand or by a new dump; this is what an offline dump is for.

Every task starts one of the project's scripts with the project's own interpreter, so this folder
needs the standard library and airflow.sdk only. One setting is mandatory, the Airflow Variable
`mol_distill_python`; deploy/README.md says how to set up one machine and many.
"""

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from distill_form import DUMPING, GATE, GRID, ONE_STUDENT, OVERRIDES, PLACES
from distill_start import ROOT, Json, interpreter, start

PODS = ROOT / "deploy" / "kubernetes"
DUMP, STUDENT = Asset("mol_distill_dump"), Asset("mol_distill_student")


def options(stage: str, given: Json) -> list[str]:
    """--name=value for what is not empty, and the overrides of a stage after them."""
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
    """The run's params. A run that a new dump started takes that dump's places, not the form's."""
    context = get_current_context()
    found = dict(context["params"])
    triggers: Any = context.get("triggering_asset_events") or {}
    for event in triggers.get(DUMP) or []:
        found |= event.extra.get("settings", {})
    return found


def scalars(summary: Json) -> Json:
    """What is worth showing of a summary: numbers, texts, flags."""
    return {
        name: value
        for name, value in summary.items()
        if isinstance(value, int | float | str) and name != "identity"
    }


def dump_script(*more: str, gpu: bool = False) -> Json:
    """scripts/dump_logits.py with the run's settings."""
    params = settings()
    given = {
        "model": params["model"],
        "output": params["dump"],
        "corpus.path": params["corpus"],
        "partitions": params["partitions"],
        "k": params["k"],
        "max_length": params["max_length"],
    }
    config = ["--config", str(ROOT / params["dump_config"]), "--summary", "{summary}"]
    script = str(ROOT / "scripts" / "dump_logits.py")
    return start([script, *config, *options("dump", given), *more], params["folder"], gpu=gpu)


def train_script(student: str, alpha: float | None, learning_rate: float | None) -> Json:
    """scripts/train_student.py; returns its summary without the run's identity."""
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
    command = [str(ROOT / "scripts" / "train_student.py"), *config, *options("train", given)]
    found = scalars(start(command, params["folder"], gpu=True, alone=student))
    return {"student": f"{student}/model", **found}


def evaluate_script(students: dict[str, str], results: str) -> dict[str, Json]:
    """scripts/evaluate.py; {model: {domain_perplexity, general_perplexity, kl_to_base}}."""
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
    """Why a student is not accepted: one line for each number that is not finite (a text in JSON),
    and for each bound that it breaks."""
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
                f"the gate bounds {name}, but nothing was measured on general text: give "
                "general.path in the evaluation's config, or empty the bound"
            )
        value = float(student[key]) / (float(base[key]) if key == "general_perplexity" else 1)
        if not value <= bound:  # not a number is a fault, too
            lines.append(f"{name}: {value:.4g}, at most {bound:g} is accepted")
    return lines


# Each of these holds a GPU: a slot of the pool `gpu`, a worker of Celery's queue `gpu`, a pod with
# one under Kubernetes. What an executor does not know, it ignores.
ON_GPU: Json = {
    "pool": "gpu",
    "queue": "gpu",
    "executor_config": {"pod_template_file": str(PODS / "gpu.yaml")},
}
ON_CPU: Json = {"executor_config": {"pod_template_file": str(PODS / "cpu.yaml")}}
DEFAULTS: Json = {
    "retries": 2,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": 2,
    "max_retry_delay": timedelta(minutes=10),
    "execution_timeout": timedelta(hours=12),
}
# Both go on where the last try stopped, so a try may be long and there may be many.
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
        """plan.json, or the proof that the one that is there is the same; I/N of each partition."""
        params = settings()
        check = "import storage, pipeline.config"
        try:
            start(["-c", check], params["folder"])
        except AirflowFailException:
            raise
        except AirflowException as error:
            raise AirflowFailException(
                f"mol_distill_python: {interpreter()} is not the project's environment ({error}); "
                "`make setup` makes it"
            ) from error
        summary = dump_script("--only=plan")
        get_current_context()["ti"].xcom_push("summary", summary)
        return [f"{index}/{params['partitions']}" for index in range(params["partitions"])]

    @task(**ON_GPU, **LONG, map_index_template="partition {{ task.op_kwargs['partition'] }}")
    def dump(partition: str) -> Json:
        """The base model's top-k over one partition."""
        return scalars(dump_script(f"--partition={partition}", gpu=True))

    @task(**ON_CPU)
    def finalize() -> Json:
        """manifest.json, once every partition is complete."""
        return scalars(dump_script("--only=finalize"))

    @task(**ON_CPU, outlets=[DUMP])
    def verify(summary: Json) -> Json:
        """Every byte read again, every row decoded; only then is there a new dump."""
        params = settings()
        start(["-m", "storage", "verify", params["dump"]], params["folder"])
        places = {name: params[name] for name in [*PLACES, *OVERRIDES]}
        get_current_context()["outlet_events"][DUMP].extra = {**summary, "settings": places}
        return summary

    @task(**ON_GPU, **LONG, outlets=[STUDENT])
    def train() -> Json:
        """Cross-entropy on the domain, KL to the dump on the general corpus."""
        params = settings()
        summary = train_script(params["student"], params["alpha"], params["learning_rate"])
        get_current_context()["outlet_events"][STUDENT].extra = summary
        return summary

    @task(**ON_GPU)
    def evaluate(trained: Json) -> dict[str, Json]:
        """Perplexities of base and student on held-out text, and the KL between them."""
        results = f"{settings()['student']}/evaluation.json"
        return evaluate_script({"student": trained["student"]}, results)

    @task(**ON_CPU)
    def gate(models: dict[str, Json]) -> Json:
        """Fails the run when the student lost more than the bounds allow."""
        broken = faults(models["student"], models["base"], settings())
        if broken:
            raise AirflowFailException(
                f"the student is not accepted. {'; '.join(broken)}. A higher alpha, a lower "
                "learning rate or fewer steps forget less; the DAG `retrain` tries several."
            )
        return models["student"]

    # Calls of tasks give references to their results, which only Airflow resolves: hence Any.
    dumped = dump.expand(partition=plan())
    finished: Any = finalize()
    verified: Any = verify(finished)
    trained: Any = train()
    models: Any = evaluate(trained)
    dumped >> finished
    verified >> trained
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

    @task(**ON_GPU, **LONG, map_index_template="{{ task.op_kwargs['point']['name'] }}")
    def train(point: Json) -> Json:
        """One student. No teacher runs: the dump is read again."""
        return {
            "name": point["name"],
            **train_script(point["student"], point["alpha"], point["learning_rate"]),
        }

    @task(**ON_GPU)
    def evaluate(trained: list[Json]) -> dict[str, Json]:
        """All students against the base, in one table."""
        students = {point["name"]: point["student"] for point in trained}
        results = f"{Path(next(iter(students.values()))).parents[1]}/evaluation.json"
        return evaluate_script(students, results)

    @task(**ON_CPU, outlets=[STUDENT])
    def choose(trained: list[Json], models: dict[str, Json]) -> Json:
        """Of the students within the bounds, the one that knows the domain best."""
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
                f"none of {len(trained)} students is within the bounds (each line above says why); "
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
