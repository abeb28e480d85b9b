"""What the trigger form asks: Airflow Params with their ranges and help texts."""

from typing import Any

from airflow.sdk import Param

# What is filled in is stored by Airflow and shown on its pages, so no URL may hold a user name, a
# password or a signature.
NO_SECRETS = (
    r"^(?!.*://[^/@]*@)(?!.*[?&][^=&]*"
    r"([Ss]ig|[Tt]oken|[Kk]ey|[Ss]ecret|[Pp]assword|[Cc]redential)[^=&]*=)"
)


def text(default: str, title: str, description: str, section: str) -> Param:
    return Param(
        default,
        type="string",
        minLength=1,
        pattern=NO_SECRETS,
        title=title,
        description=description,
        section=section,
    )


def optional(kind: str, title: str, description: str, section: str, **schema: Any) -> Param:
    """A field that may stay empty; the config file decides then."""
    if kind == "string":
        schema["pattern"] = NO_SECRETS
    return Param(
        None, type=["null", kind], title=title, description=description, section=section, **schema
    )


WHERE, TRAINING, BOUNDS, MORE = "Where things are", "Training", "Bounds of the gate", "More"
PLACES = {
    "folder": text(
        "runs/demo",
        "Working folder",
        "Relative paths below and in the config files start here. Relative to the project itself.",
        WHERE,
    ),
    "model": text(
        "base/model",
        "Base model",
        "A Hugging Face directory or hub name. It is the teacher, and the student starts from it.",
        WHERE,
    ),
    "dump": text(
        "airflow/dump",
        "Dump",
        "Where the base model's top-k go: a directory, or s3://bucket/key. An unfinished dump "
        "there is gone on with; a dump with other settings is refused.",
        WHERE,
    ),
    "domain": optional(
        "string",
        "Domain corpus",
        "Files, a glob or a hub name. Empty: what the training config says.",
        WHERE,
    ),
    "train_config": text(
        "scripts/configs/demo/mol.yaml",
        "Config of training",
        "A YAML file for scripts/train_student.py, absolute or relative to the project.",
        WHERE,
    ),
    "evaluate_config": text(
        "scripts/configs/demo/evaluate.yaml",
        "Config of evaluation",
        "A YAML file for scripts/evaluate.py: held-out domain and general text.",
        WHERE,
    ),
}
DUMPING = {
    "dump_config": text(
        "scripts/configs/demo/dump.yaml",
        "Config of stage one",
        "A YAML file for scripts/dump_logits.py, absolute or relative to the project.",
        WHERE,
    ),
    "corpus": optional(
        "string",
        "General corpus",
        "Files, a glob or a hub name. Empty: what the config says.",
        WHERE,
    ),
    "partitions": Param(
        4,
        type="integer",
        minimum=1,
        maximum=1024,
        title="Partitions",
        description="Parts of the general corpus, each a task that is retried by itself. As many "
        "run at a time as the pool `gpu` has slots; each starts the engine once.",
        section="Stage one",
    ),
    "k": optional(
        "integer",
        "Entries kept at each position",
        "Top-k. Empty: what the config says.",
        "Stage one",
        minimum=1,
        maximum=65535,
    ),
    "max_length": optional(
        "integer",
        "Longest sequence in tokens",
        "Longer documents are cut into chunks. Empty: what the config says.",
        "Stage one",
        minimum=2,
    ),
}
ONE_STUDENT = {
    "student": text(
        "airflow/student",
        "Student",
        "Directory for checkpoints and the final model (in model/). An unfinished run there is "
        "gone on with; a run with other settings is refused.",
        TRAINING,
    ),
    "alpha": optional(
        "number",
        "Weight of the KL (alpha)",
        "Higher forgets less and learns the domain more slowly. Empty: what the config says.",
        TRAINING,
        minimum=0,
        maximum=1000,
    ),
    "learning_rate": optional(
        "number",
        "Learning rate",
        "Empty: what the config says.",
        TRAINING,
        exclusiveMinimum=0,
        maximum=1,
    ),
}
GRID = {
    "students": text(
        "airflow/students",
        "Students",
        "Directory for one student for each point of the grid, under the name of its dump.",
        TRAINING,
    ),
    "alphas": Param(
        [0.3, 1, 3],
        type="array",
        items={"type": "number", "minimum": 0, "maximum": 1000},
        minItems=1,
        uniqueItems=True,
        title="Weights of the KL (alpha)",
        description="One student for each pair of a weight and a learning rate.",
        section=TRAINING,
    ),
    "learning_rates": Param(
        [0.001, 0.0003],
        type="array",
        items={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        minItems=1,
        uniqueItems=True,
        title="Learning rates",
        description="Peak learning rates, such as 0.0003.",
        section=TRAINING,
    ),
}
GATE = {
    "max_general_ratio": Param(
        1.25,
        type=["null", "number"],
        minimum=0,
        title="General perplexity, times the base's",
        description="The run fails when the student's perplexity on general text is above this "
        "many times the base's. Empty: no bound.",
        section=BOUNDS,
    ),
    "max_kl": Param(
        0.5,
        type=["null", "number"],
        minimum=0,
        title="KL to the base on general text, nats per token",
        description="The run fails above it. Empty: no bound.",
        section=BOUNDS,
    ),
}
# No option of the script itself, such as a path to write to, and no secret. JSON schema asks for
# ECMA's patterns, where $ is the end of the text; (?!\n) makes it so in Python, too.
OVERRIDE = (
    r"^(?!\w+\.(config|summary|partition|only|estimate|run_tokens)=)"
    r"(?![^=]*([Tt]oken|[Kk]ey|[Ss]ecret|[Pp]assword)=)"
    + NO_SECRETS.removeprefix("^")
    + r"(dump|train|evaluate)\.[A-Za-z_][\w.]*=[^\n]*$(?!\n)"
)
OVERRIDES = {
    "overrides": Param(
        None,
        type=["null", "array"],
        items={"type": "string", "pattern": OVERRIDE},
        title="Any other setting",
        description="One on a line: STAGE.OPTION=VALUE with the stages dump, train and evaluate, "
        "for example train.training.max_steps=500 or dump.engine_args.tensor_parallel_size=2.",
        section=MORE,
    )
}
