"""The fields of the trigger form: Airflow Params with their ranges and help texts."""

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
    """A field that may be empty; then the config file decides."""
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
        "Base of relative paths below and in the config files. Itself relative to the project.",
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
        "Where the base model's top-k are stored: a directory, or s3://bucket/key. An unfinished "
        "dump there is resumed; a dump with other settings is refused.",
        WHERE,
    ),
    "domain": optional(
        "string",
        "Domain corpus",
        "Files, a glob or a hub name. Empty: the value in the training config.",
        WHERE,
    ),
    "train_config": text(
        "scripts/configs/demo/mol.yaml",
        "Training config",
        "A YAML file for scripts/train_student.py, absolute or relative to the project.",
        WHERE,
    ),
    "evaluate_config": text(
        "scripts/configs/demo/evaluate.yaml",
        "Evaluation config",
        "A YAML file for scripts/evaluate.py: held-out domain and general text.",
        WHERE,
    ),
}
DUMPING = {
    "dump_config": text(
        "scripts/configs/demo/dump.yaml",
        "Dump config",
        "A YAML file for scripts/dump_logits.py, absolute or relative to the project.",
        WHERE,
    ),
    "corpus": optional(
        "string",
        "General corpus",
        "Files, a glob or a hub name. Empty: the value in the dump config.",
        WHERE,
    ),
    "partitions": Param(
        4,
        type="integer",
        minimum=1,
        maximum=1024,
        title="Partitions",
        description="Parts of the general corpus. Each is one task, which starts the engine once "
        "and is retried alone. The slots of the pool `gpu` limit how many run at a time.",
        section="Stage one",
    ),
    "k": optional(
        "integer",
        "Entries kept at each position",
        "Top-k. Empty: the value in the dump config.",
        "Stage one",
        minimum=1,
        maximum=65535,
    ),
    "positions": optional(
        "number",
        "Share of the targets",
        "Each token that is learnt is kept with this probability: 0.2 keeps a fifth of the bytes "
        "and of the head's work. Empty: the value in the dump config.",
        "Stage one",
        exclusiveMinimum=0,
        maximum=1,
    ),
    "max_length": optional(
        "integer",
        "Longest sequence in tokens",
        "Longer documents are cut into chunks. Empty: the value in the dump config.",
        "Stage one",
        minimum=2,
    ),
}
ONE_STUDENT = {
    "student": text(
        "airflow/student",
        "Student",
        "Directory for checkpoints and the final model (in model/). An unfinished run there is "
        "resumed; a run with other settings is refused.",
        TRAINING,
    ),
    "alpha": optional(
        "number",
        "Weight of the KL (alpha)",
        "A higher weight forgets less and learns the domain more slowly. Empty: the value in the "
        "training config.",
        TRAINING,
        minimum=0,
        maximum=1000,
    ),
    "learning_rate": optional(
        "number",
        "Learning rate",
        "Peak learning rate. Empty: the value in the training config.",
        TRAINING,
        exclusiveMinimum=0,
        maximum=1,
    ),
    "hosts": Param(
        1,
        type="integer",
        minimum=1,
        maximum=64,
        title="Hosts",
        description="Machines that train the student together. Each is one task, with a slot of "
        "the pool `gpu`; all need the same working folder, and reach each other by name.",
        section=TRAINING,
    ),
}
GRID = {
    "students": text(
        "airflow/students",
        "Students",
        "Directory of the students, one per grid point, in a folder with the name of their dump.",
        TRAINING,
    ),
    "alphas": Param(
        [0.3, 1, 3],
        type="array",
        items={"type": "number", "minimum": 0, "maximum": 1000},
        minItems=1,
        uniqueItems=True,
        title="Weights of the KL (alpha)",
        description="One student is trained for each pair of a weight and a learning rate.",
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
        description="The run fails if the student's perplexity on general text, divided by the "
        "base's, is above this value. Empty: no bound.",
        section=BOUNDS,
    ),
    "max_kl": Param(
        0.5,
        type=["null", "number"],
        minimum=0,
        title="KL to the base on general text, nats per token",
        description="The run fails above this value. Empty: no bound.",
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
        description="One per line: STAGE.OPTION=VALUE with the stages dump, train and evaluate, "
        "for example train.training.max_steps=500 or dump.engine_args.tensor_parallel_size=2.",
        section=MORE,
    )
}
