"""What a study's settings may be."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.config import CorpusConfig, HeldOutConfig
from pipeline.errors import ConfigError
from pipeline.study.config import ArmConfig, StudyConfig
from tests.helpers.paths import SCRIPTS

CORPUS = CorpusConfig("c")
RECIPES = [*SCRIPTS.glob("configs/study*.yaml"), *SCRIPTS.glob("studies/*.yaml")]


def study(arm: str = "mol", dump: str = "main", **given: Any) -> StudyConfig:
    settings: dict[str, Any] = {
        "model": "m",
        "domain": CORPUS,
        "general": CORPUS,
        "held_out": HeldOutConfig(domain=CORPUS, general=CORPUS),
        "output": "o",
        "arms": {arm: ArmConfig()},
        "dumps": {dump: "path/of/a/dump"},
    }
    return StudyConfig(**settings | given)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe.stem))
def test_recipes_are_accepted(recipe: Path) -> None:
    cli.parse(cli.script_parser(StudyConfig, ""), StudyConfig, ["--config", str(recipe)])


@pytest.mark.parametrize("name", ["mol", "alpha-0.25", "ce half", "β=3", "8", "a" * 100])
def test_names_of_directories(name: str) -> None:
    study(arm=name, dump=name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../out", "a/b", "/etc", ".hidden", "-rf", "a\n", "a\0b", "a" * 101]
)
def test_other_names_are_refused(name: str) -> None:
    """A run is made in runs/NAME-…: a path would put it anywhere."""
    for given in ({"arm": name}, {"dump": name}):
        with pytest.raises(ConfigError, match="a name becomes part of a directory's"):
            study(**given)


@pytest.mark.parametrize(
    ("train", "name", "instead"),
    [
        ({"training": {"learning_rate": 0.1}}, "training.learning_rate", "set learning_rates of"),
        ({"training.learning_rate": None}, "training.learning_rate", "set learning_rates of"),
        ({"training": {"seed": 1}}, "training.seed", "set seeds of the study or of the arm"),
        ({"training": {"output_dir": "x"}}, "training.output_dir", "set output of the study"),
        ({"output": "x"}, "output", "set output of the study"),
        ({"dump": "x"}, "dump", "name it in dumps of the study"),
        ({"dump": {"x": 1, "y": 2}}, "dump.x", "name it in dumps of the study"),
    ],
)
def test_what_the_study_sets_is_refused_by_name(
    train: dict[str, Any], name: str, instead: str
) -> None:
    """It would override what the user wrote."""
    with pytest.raises(ConfigError, match=rf"^train\.{name}: .*{instead}"):
        study(train=train)
    with pytest.raises(ConfigError, match=rf"^arms\.ce half\.train\.{name}: .*{instead}"):
        study(arms={"mol": ArmConfig(), "ce half": ArmConfig(train=train)})


@pytest.mark.parametrize("name", ["learning_rate", "seed", "output_dir"])
def test_training_of_a_study_has_no_seed_and_rate(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^training\.{name}: the study sets it for each run"):
        study(training={"max_steps": 3, name: 1})


def test_a_study_without_dumps_may_name_some_for_training() -> None:
    """Several with weights are no dump of a study."""
    assert study(dumps={}, train={"dump": {"x": 3, "y": 1}}).train["dump"] == {"x": 3, "y": 1}


def test_a_dump_of_the_study_has_no_output() -> None:
    with pytest.raises(ConfigError, match=r"dumps\.main\.output: .*dumps: \{main: PATH\}"):
        study(dumps={"main": {"k": 8, "output": "x"}})


def test_an_argument_for_all_arms_has_one_place() -> None:
    given = {"training": {"max_steps": 3, "bf16": True}}
    with pytest.raises(ConfigError, match=r"train\.training\.max_steps and training\.max_steps"):
        study(train=given, training={"max_steps": 4})
    study(train=given, training={"warmup_steps": 4})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"training": None}, r"train\.training: expected arguments .*found None"),
        ({"training": [1]}, r"train\.training: expected arguments .*found \[1\]"),
        ({"mix": None}, r"train\.mix: expected a number, found None"),
        ({"mix": "half"}, r"train\.mix: expected a number, found 'half'"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(train=train)


REVERSE = {"loss": {"direction": "reverse"}}


@pytest.mark.parametrize(
    ("arm", "setting", "message"),
    [
        (ArmConfig(targets="labels", k=1), "k", "labels use no stored entries"),
        (ArmConfig(targets="labels", train=REVERSE), "train.loss.direction", "no KL"),
        (ArmConfig(targets="live", k=1), "k", "live uses no stored entries"),
        (
            ArmConfig(targets="live", train={"loss.targets": "topk"}),
            "train.loss.targets",
            "live uses no stored entries",
        ),
        (ArmConfig(train={"mix": 0, "loss": {"alpha": 2}}), "train.loss.alpha", "mix: 0 reads"),
        (ArmConfig(train={"mix": 0}, targets="live"), "targets", "mix: 0 reads no general"),
        (ArmConfig(train={"mix": 0.0}, dump="main"), "dump", "mix: 0 reads no general"),
        (ArmConfig(train={"mix": 0}, k=3), "k", "mix: 0 reads no general"),
        (ArmConfig(train={"mix": 0}, domain=False), "domain", "mix: 0 reads no general"),
        (ArmConfig(weight=0.25), "weight", "set interpolate"),
        (ArmConfig(interpolate="ce", targets="labels"), "targets", "the arm interpolates"),
        (ArmConfig(interpolate="ce", domain=False), "domain", "the arm interpolates"),
        (ArmConfig(interpolate="ce", train={"mix": 0}), "train", "the arm interpolates"),
    ],
)
def test_settings_of_an_arm_without_effect_are_refused(
    arm: ArmConfig, setting: str, message: str
) -> None:
    arms = {"ce": ArmConfig(train={"mix": 0}), "mine": arm}
    with pytest.raises(ConfigError, match=rf"^arms\.mine\.{setting}: has no effect: .*{message}"):
        study(arms=arms)


def test_settings_of_all_arms_need_not_matter_to_each() -> None:
    """Only an arm's own are its mistakes; but the mix of all is the mix of each."""
    arms = {
        "ce": ArmConfig(train={"mix": 0}),
        "ce-both": ArmConfig(targets="labels"),
        "live": ArmConfig(targets="live", train={"loss": {"alpha": 2}}),
        "half": ArmConfig(interpolate="ce", weight=0.25),
    }
    study(arms=arms, train=REVERSE)
    with pytest.raises(ConfigError, match=r"^arms\.mine\.k: has no effect: mix: 0"):
        study(arms={"mine": ArmConfig(k=1)}, train={"mix": 0})
    study(arms={"mine": ArmConfig(k=1, train={"mix": 1})}, train={"mix": 0})


def test_labels_have_no_gradient_of_a_kl() -> None:
    every = {"gradient_cosine_steps": 5}
    both = {"mol": ArmConfig(k=8), "ce-both": ArmConfig(targets="labels")}
    with pytest.raises(ConfigError, match=r"ce-both\.train\.gradient_cosine_steps: .*set 0 in"):
        study(arms=both, train=every)
    both["ce-both"] = ArmConfig(targets="labels", train={"gradient_cosine_steps": 0})
    study(arms=both, train=every)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": []}, "seeds: expected at least one"),
        ({"learning_rates": []}, "learning_rates: expected at least one"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is there twice"),
        ({"learning_rates": [1e-3, 1.0000001e-3]}, "learning_rates: 0.001 is there twice"),
    ],
)
def test_each_seed_and_rate_names_a_run(given: dict[str, Any], message: str) -> None:
    """Of two rates with one name only the first would be trained."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        study(**given)
    with pytest.raises(ConfigError, match=rf"^arms\.mol\.{message}"):
        study(arms={"mol": ArmConfig(**given)})
    study(seeds=[1234567, 1234568], learning_rates=[1e-3, 1.1e-3])
