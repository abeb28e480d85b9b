"""Text from anyone does not command a terminal, and secrets are neither shown nor written."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli
from pipeline.config import CorpusConfig, DumpConfig, TrainConfig
from pipeline.errors import ConfigError, FailedError, RefusedError
from pipeline.foreign import printable, refuse_secrets
from pipeline.progress import say

TITLE = "\x1b]0;owned\x07\x1b[2J"  # sets a window's title, clears the screen


@given(st.text())
def test_no_character_is_a_command(text: str) -> None:
    shown = printable(text)
    kinds = {unicodedata.category(c) for c in shown if c not in "\n\t\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(
    st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]).filter(lambda c: c not in "@="))
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert printable(text + "\n\t") == text + "\n\t"


def test_what_is_escaped_can_be_read() -> None:
    assert printable("a" + TITLE) == r"a\x1b]0;owned\x07\x1b[2J"
    assert printable("\u202egnp.exe \x9b1m \ud800\r") == r"\u202egnp.exe \x9b1m \ud800\r"


def test_messages_and_errors_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    say(f"document {TITLE}")
    for error in (ConfigError(TITLE), FailedError(TITLE), RefusedError(TITLE)):
        cli.main(lambda error=error: fail(error), None)  # type: ignore[misc]
    for arguments in (["--corpus.limit", TITLE], [f"--{TITLE}", "1"], ["--k", "0"]):
        parser = cli.script_parser(DumpConfig, "test")
        given_ = ["--model", "m" + TITLE, "--corpus.path", TITLE, "--output", "o", *arguments]
        with pytest.raises(SystemExit) as stopped:
            cli.parse(parser, DumpConfig, given_)
        assert stopped.value.code == 2
    found = capsys.readouterr()
    assert found.err.count(r"\x1b]0;owned") >= 5
    assert not {"\x1b", "\x07"} & set(found.err + found.out)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:SECRET@bucket/dump", "s3://***@bucket/dump"),
        ("https://u@host/a@b", "https://***@host/a@b"),
        ("http://h/f?X-Amz-Signature=SECRET&part=1", "http://h/f?X-Amz-Signature=***&part=1"),
        ("http://h/f?sig=SECRET 'and'", "http://h/f?sig=*** 'and'"),
        ("hf://datasets/owner/name@main", "hf://datasets/owner/name@main"),
        ("a@b c://d e@f", "a@b c://d e@f"),
    ],
)
def test_secrets_in_urls_are_hidden(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_secrets_in_settings_are_refused() -> None:
    def train(**settings: object) -> TrainConfig:
        given_ = {"domain": CorpusConfig("c"), "output": "o", "mix": 0, "max_length": 8, **settings}
        return TrainConfig(model="m", **given_)  # type: ignore[arg-type]

    fine = {"learning_rate": 1e-4, "push_to_hub_token": None, "include_num_input_tokens_seen": "no"}
    refuse_secrets(train(training=fine, lora={"pad_token": "<pad>"}))
    wrong = {
        "output": train(output="s3://AKIA:SECRET@b/run"),
        "domain.path": train(domain=CorpusConfig("http://h/c.jsonl?X-Amz-Signature=SECRET")),
        "dump": train(dump={"s3://AKIA:SECRET@b/dump": 1.0}, mix=1),
        "training.hub_token": train(training={"hub_token": "hf_SECRET"}),
        "training.a.api_key": train(training={"a": {"api_key": "SECRET"}}),
    }
    for name, settings in wrong.items():
        with pytest.raises(ConfigError, match=f"^{name}: ") as refused:
            refuse_secrets(settings)
        assert "SECRET" not in str(refused.value).replace("AWS_SECRET_ACCESS_KEY", "")


def test_scripts_refuse_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.script_parser(DumpConfig, "test")
    arguments = ["--model=m", "--corpus.path=c", "--output=s3://AKIA:HIDDEN@b/dump"]
    with pytest.raises(SystemExit) as stopped:
        cli.parse(parser, DumpConfig, arguments)
    assert stopped.value.code == 2
    found = capsys.readouterr().err
    assert "output: s3://***@b/dump holds a user name" in found
    assert "HIDDEN" not in found
