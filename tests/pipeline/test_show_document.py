"""People look at the mask of a document before they run anything."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import cli, show_document
from pipeline.config import CorpusConfig, DumpConfig, EvalConfig, HeldOutConfig, TrainConfig
from pipeline.corpus import Corpus
from pipeline.dump.plan import open_corpus
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from tests.helpers.chat_templates import CHATML, tokenizer_with
from tests.helpers.corpora import write_jsonl
from tests.pipeline.test_spans import with_framing

CHAT = [
    {"role": "user", "content": "Hi \x1b[2J"},
    {"role": "assistant", "content": "Well,\n  🙂 é and so on"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    rows = [{"messages": CHAT[:1]}, {"messages": CHAT, "id": "second"}]
    return str(write_jsonl(tmp_path / "c.jsonl", rows))


def opened(path: str, max_length: int = 1000, **given: Any) -> Corpus:
    given = {"messages_column": "messages", "targets": "assistant", **given}
    return Corpus(CorpusConfig(path, **given), tokenizer_with(CHATML), max_length)


def test_targets_are_marked(chats: str) -> None:
    title, chunk, *rest = show_document.lines(opened(chats), 1, color=False)
    assert title.startswith(f"corpus {chats}, document 1, id second: ")
    assert title.split(": ")[1].split(",")[0] == chunk.split(": ")[1].split(",")[0]
    text = "\n".join(rest)
    assert "<|im_start|>user\nHi \\x1b[2J<|im_end|>\n" in text
    assert (
        "<|im_start|>assistant\n⟦Well,\n  🙂 é and so on<|im_end|>⟧\n<|im_start|>user\nBye<|im_e"
        in text
    )
    assert text.count("⟦") == text.count("⟧") == 1
    assert text.replace("⟦", "").replace("⟧", "").replace("\\x1b", "\x1b") == opened(chats).text(1)


def test_a_terminal_has_colours(chats: str) -> None:
    text = "\n".join(show_document.lines(opened(chats), 1, color=True))
    assert "assistant\n\x1b[1;32mWell,↵\n  🙂 é and so on<|im_end|>\x1b[0m\n<|im_start|>" in text
    assert text.count("\x1b") == 2


def test_each_chunk_is_shown_and_a_document_without_targets(chats: str) -> None:
    found = list(show_document.lines(opened(chats, max_length=60), 1, color=False))
    chunks = [line for line in found if line.startswith("--- chunk")]
    sequences = list(opened(chats, max_length=60).sequences(1, 2))
    assert len(chunks) == len(sequences) > 1
    for line, sequence in zip(chunks, sequences, strict=True):
        counts = f"{len(sequence.input_ids)} tokens, {len(sequence.positions)} targets"
        assert line == f"--- chunk {sequence.chunk}: {counts}"
    _, left_out, *text = show_document.lines(opened(chats), 0, color=False)
    assert left_out == "left out: nothing is learnt within its first 1,000 tokens"
    assert "Hi \\x1b[2J" in "".join(text)


def test_a_first_word_keeps_its_space() -> None:
    tokenizer = with_framing()
    ids = tokenizer("in the end", add_special_tokens=False)["input_ids"]
    start = len(tokenizer("in the", add_special_tokens=False)["input_ids"])
    assert show_document.text_of(tokenizer, ids, start, len(ids)) == " end"
    assert show_document.text_of(tokenizer, ids, 0, start) == "in the"


def settings(model: str, text: str) -> list[Any]:
    corpus, other = CorpusConfig(text), CorpusConfig(text, skip=1)
    held_out = HeldOutConfig(general=other)
    return [
        DumpConfig(model, corpus, "none", max_length=64),
        TrainConfig(model, corpus, "none", mix=0, max_length=64, held_out=held_out),
        EvalConfig({"base": model}, domain=corpus, general=other, max_length=64),
    ]


def test_every_corpus_of_every_script_is_shown(
    tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "one small thing"}, {"text": "two"}]
    path = str(write_jsonl(tmp_path / "c.jsonl", rows))
    eos = ModelFolder(model_path).tokenizer.eos_token
    second = ["", "held_out.general:", "general:"]
    for config, name in zip(settings(str(model_path), path), second, strict=True):
        found = show_document.run("0", config)
        assert found["targets"] == found["tokens"] - 1
        assert f"n⟦e small thing{eos}⟧" in capsys.readouterr().out
        if name:
            show_document.run(f"{name}0", config)
            assert capsys.readouterr().out.endswith(f"t⟦wo{eos}⟧\n")
        for wrong in ("2", "x", "-1", "x:0", f"{name}9", "²"):
            with pytest.raises(ConfigError, match="--show_document"):
                show_document.run(wrong, config)
        assert not Path(config.output or "none").exists()


def test_a_share_of_the_targets_is_shown(
    tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_jsonl(tmp_path / "c.jsonl", [{"text": "one small thing " * 30}]))
    config = DumpConfig(str(model_path), CorpusConfig(path), "none", positions=0.2)
    found = show_document.run("0", config)
    assert 0 < found["targets"] < found["tokens"] / 2
    (sequence,) = open_corpus(config, ModelFolder(model_path)).sequences()
    assert found["targets"] == len(sequence.positions)
    assert capsys.readouterr().out.count("⟦") > 3


@pytest.mark.parametrize("config", [DumpConfig, TrainConfig, EvalConfig])
def test_the_option_is_explained(config: Any) -> None:
    text = cli.script_parser(config, "", show_document=True).format_help()
    assert "--show_document [CORPUS:]N" in text
