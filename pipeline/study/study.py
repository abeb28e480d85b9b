"""A study: arms × learning rates × seeds, each trained and measured once, collected in a table.

A run is a directory with its settings (run.json), the output of training, and measures.json, which
is written last. The runs follow one another in this process.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import Config, parse, script_parser
from pipeline.config import DumpConfig, EvalConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import Comparison
from pipeline.evaluation.tasks import Tasks
from pipeline.json_files import read_json, write_json
from pipeline.models.directory import ModelFolder
from pipeline.places import check_output, inputs_of
from pipeline.progress import say, show
from pipeline.recorded import recorded, refuse_other_settings
from pipeline.script_files import run_script
from pipeline.signals import stop_on_signals
from pipeline.study import arms
from pipeline.study.config import StudyConfig
from pipeline.study.results import BASE, RESULTS, collect, of_run, table
from pipeline.study.task_answers import StudyAnswers
from pipeline.study.train_settings import merged
from pipeline.training import train
from pipeline.training.arguments import training_arguments
from pipeline.training.lock import hold
from pipeline.training.output import FINAL, Output
from pipeline.types import Json

RUN, MEASURES, TABLE = "run.json", "measures.json", "table.md"


@dataclass(frozen=True)
class Run:
    """One arm at one learning rate with one seed."""

    name: str
    arm: str
    learning_rate: float
    seed: int
    folder: Path
    settings: Json
    """Settings of scripts/train_student.py."""


def run(config: StudyConfig) -> Json:
    """Do the missing runs, write results.json and table.md, and return the results.

    Raises what training and evaluation raise, and RefusedError if a run's directory holds other
    settings. After an interruption the same command resumes.
    """
    study = Study(config)
    output = Path(config.output)
    runs = list(plan(config))
    todo = [one for one in runs if config.only is None or one.arm in config.only]
    check_output(config.output, {**dict(inputs_of(config)), "model": str(study.folder.path)})
    with stop_on_signals(), hold(output):
        study.check(runs, todo)  # find mistakes before hours of work
        for name in needed_dumps(config, todo):
            parse_dump(config, name)
        for name in needed_dumps(config, todo):
            make_dump(config, name)
        results = study.gather(runs)
        for number, one in enumerate(todo, 1):
            say(f"\n=== run {number} of {len(todo)}: {one.name}")
            study.do(one)
            results = study.gather(runs)
    show(table(results))
    say(f"written to {output / RESULTS} and {output / TABLE}")
    return results


def plan(config: StudyConfig) -> Iterator[Run]:
    """Yield every run of the study, seed by seed: an interrupted study has complete seeds."""
    seeds = {seed for arm in config.arms.values() for seed in arm.seeds or config.seeds}
    trained = [name for name, arm in config.arms.items() if not arm.interpolate]
    mixed = [name for name, arm in config.arms.items() if arm.interpolate]
    for seed in sorted(seeds):
        for name in trained + mixed:
            arm = config.arms[name]
            if seed in (arm.seeds or config.seeds):
                for rate in arm.learning_rates or config.learning_rates:
                    yield make_run(config, name, rate, seed)


def make_run(config: StudyConfig, name: str, rate: float, seed: int) -> Run:
    arm = config.arms[name]
    full = f"{name}-lr{rate:g}-seed{seed}"
    folder = Path(config.output) / "runs" / full
    settings: Json = {
        "model": config.model,
        "domain": recorded(config.domain),
        "max_length": config.max_length,
        "training": {"save_strategy": "no", "report_to": "none"},
    }
    measure = config.measure
    if measure.curve_steps:
        settings["held_out"] = recorded(config.held_out) | {"sequences": measure.curve_sequences}
        settings["training"] |= {
            "eval_strategy": "steps",
            "eval_steps": measure.curve_steps,
            "eval_on_start": True,
        }
    for given in (config.train, {"training": config.training}, arm.train):
        settings = merged(settings, given)
    settings["training"] |= {"seed": seed, "learning_rate": rate}
    settings["output"] = str(folder)
    if config.dumps and settings.get("mix", 1) > 0:
        settings["dump"] = dump_path(config, arm.dump or next(iter(config.dumps)))
    return Run(full, name, rate, seed, folder, settings)


def needed_dumps(config: StudyConfig, runs: list[Run]) -> list[str]:
    trained = [one for one in runs if not config.arms[one.arm].interpolate]
    used = {one.settings.get("dump") for one in trained}
    return [name for name in config.dumps if dump_path(config, name) in used]


def dump_path(config: StudyConfig, name: str) -> str:
    given = config.dumps[name]
    return given if isinstance(given, str) else str(Path(config.output) / "dumps" / name)


def make_dump(config: StudyConfig, name: str) -> None:
    """Run the dump script in its own process, so that the engine's memory is free for training."""
    if isinstance(config.dumps[name], str):
        return
    folder = Path(dump_path(config, name))
    if (folder / "manifest.json").exists():
        return
    say(f"\n=== dump {name}")
    run_script("dump_logits.py", "--config", str(dump_settings(config, name)))


def parse_dump(config: StudyConfig, name: str) -> None:
    """Write a dump's settings to a file and parse it as scripts/dump_logits.py does.

    Raises ConfigError for wrong settings, and RefusedError if the dump was begun with others.
    """
    given = config.dumps[name]
    if isinstance(given, str):
        return
    folder, file = Path(dump_path(config, name)), dump_settings(config, name)
    settings = {
        "model": config.model,
        "corpus": recorded(config.general),
        "max_length": config.max_length,
        **given,
        "output": str(folder),
    }
    if folder.exists() and file.exists():
        refuse_other_settings(folder, read_json(file), settings)
    write_json(file, settings)
    parsed(file, DumpConfig, f"dump {name}")


def dump_settings(config: StudyConfig, name: str) -> Path:
    """Beside the dump: its directory is the dump script's own."""
    return Path(dump_path(config, name)).with_name(f"{name}.json")


class Study:
    """Trains runs and measures them against the base on the held-out text."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.folder = config, ModelFolder.find(config.model)
        tasks = Tasks(config.tasks, config.measure.batch_tokens)
        self.answers = StudyAnswers(tasks, self.folder, config.measure.dtype)
        self._comparison: Comparison | None = None

    def check(self, runs: list[Run], todo: list[Run]) -> None:
        """Find mistakes in what is to be done, and other settings in all that is there.

        Raises ConfigError and RefusedError.
        """
        check_same(Path(self.config.output) / BASE, self.measuring())
        for one in runs:  # the results hold finished runs of all arms
            check_same(one.folder, self.settings(one))
        for one in todo:
            between = self.between(one)
            if between is None:
                settings = parse_training(one)
                if not (one.folder / MEASURES).exists():
                    training_arguments(settings)
            elif between.name not in {other.name for other in todo}:
                refuse_unfinished(one, between)

    def between(self, one: Run) -> Run | None:
        """The run between which and the base a run interpolates; None for one that is trained."""
        other = self.config.arms[one.arm].interpolate
        return None if other is None else make_run(self.config, other, one.learning_rate, one.seed)

    def gather(self, runs: list[Run]) -> Json:
        """Write results.json and table.md of the finished runs, and return the results."""
        config, output = self.config, Path(self.config.output)
        base, asked = self.base(), output / BASE
        base |= self.answers.measured(asked, asked)
        folders = {one.name: one.folder for one in runs if (one.folder / MEASURES).exists()}
        finished = {
            one.name: {"arm": one.arm, "learning_rate": one.learning_rate, "seed": one.seed}
            | of_run(one.folder, base)
            | self.answers.measured(one.folder, asked)
            for one in runs
            if one.name in folders
        }
        results = collect(config, finished, base)
        self.answers.add_arms(results, folders, asked)
        write_json(output / RESULTS, results)
        (output / TABLE).write_text(table(results) + "\n", encoding="utf-8")
        return results

    @property
    def comparison(self) -> Comparison:
        if self._comparison is None:  # loads the base, which is not needed if all runs are measured
            config = self.config
            settings = EvalConfig(
                models={BASE: config.model},
                domain=config.held_out.domain,
                general=config.held_out.general,
                other=config.held_out.other,
                max_length=config.max_length,
                dtype=config.measure.dtype,
                batch_tokens=config.measure.batch_tokens,
                sequences=config.held_out.sequences,
                tail_k=config.measure.tail_k,
            )
            self._comparison = Comparison(settings, self.folder)
        return self._comparison

    def measuring(self) -> Json:
        """Settings that decide the measures of a student."""
        config = self.config
        kept = {k: v for k, v in recorded(config.measure).items() if not k.startswith("curve_")}
        return {"model": config.model, "held_out": recorded(config.held_out), **kept}

    def base(self) -> Json:
        folder = Path(self.config.output) / BASE
        check_same(folder, self.measuring())
        write_json(folder / RUN, self.measuring())
        measured = self.measured(folder, BASE, self.folder)
        self.answers.complete(folder, BASE, self.folder)
        return measured

    def settings(self, one: Run) -> Json:
        """All settings that decide a run."""
        arm = recorded(self.config.arms[one.arm])
        for name in ("seeds", "learning_rates"):
            del arm[name]  # they decide which runs there are, not the content of a run
        return {"arm": arm, "train": one.settings, "measure": self.measuring()}

    def do(self, one: Run) -> None:
        """Train and measure a run, unless that is done."""
        arm = self.config.arms[one.arm]
        student = one.folder / FINAL
        if not (one.folder / MEASURES).exists():
            write_json(one.folder / RUN, self.settings(one))
            between = self.between(one)
            if between is not None:
                refuse_unfinished(one, between)
                other = between.folder / FINAL
                output = Output(one.folder, json.loads(json.dumps(self.settings(one))))
                arms.interpolate(self.folder, ModelFolder(other), arm.weight, output)
            else:
                summary = train.run(parse_training(one), arms.trainer_of(arm, self.folder))
                output = Output(one.folder, summary["identity"])
                for checkpoint in filter(output.is_own, output.checkpoints()):
                    output.remove(checkpoint)
        self.measured(one.folder, one.name, ModelFolder(student))
        self.answers.complete(one.folder, one.name, ModelFolder(student))

    def measured(self, folder: Path, name: str, model: ModelFolder) -> Json:
        """The content of measures.json; measures the model first if the file is missing."""
        file = folder / MEASURES
        if not file.exists():
            write_json(file, self.comparison.measure(name, model))
        return read_json(file)


def check_same(folder: Path, settings: Json) -> None:
    """Raises RefusedError if the folder holds a run that was begun with other settings."""
    if (folder / RUN).exists():
        refuse_other_settings(folder, read_json(folder / RUN), json.loads(json.dumps(settings)))


def refuse_unfinished(one: Run, between: Run) -> None:
    """ConfigError where the student that a run interpolates is not there."""
    if not (between.folder / FINAL).exists():
        raise ConfigError(
            f"{one.name}: {between.name} is not finished; run it first. Both arms need the same "
            "seed and learning rate"
        )


def parse_training(one: Run) -> TrainConfig:
    """Write the run's settings to a file and parse it as scripts/train_student.py does."""
    file = one.folder / "train.json"
    write_json(file, one.settings)
    return parsed(file, TrainConfig, one.name)


def parsed(file: Path, kind: type[Config], name: str) -> Config:
    """The settings in a file, parsed as the script that takes them does. Raises ConfigError."""
    try:
        return parse(script_parser(kind, ""), kind, ["--config", str(file)])[0]
    except SystemExit:
        raise ConfigError(f"{name}: its settings are wrong; see the message above") from None
