"""Plans hold what decides the rows: the rendered text, not how a path is spelled."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.config import CorpusConfig, DumpConfig
from pipeline.dump.plan import COARSE, MIN_PROB, make_plan, open_corpus, plan_differences, settled
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder, leaves
from pipeline.types import Json
from storage.codec.codec import STEPS
from tests.helpers.corpora import some_texts, write_jsonl, write_texts


def plan_of(
    model: Path | str,
    corpus: Path | str,
    settings: Json | None = None,
    there: Json | None = None,
    **more: str,
) -> Json:
    given: Json = {"k": 8, **(settings or {})}
    config = DumpConfig(str(model), CorpusConfig(str(corpus), **more), "unused", **given)  # type: ignore[arg-type]
    config = settled(config, there)
    folder = ModelFolder.find(config.model)
    opened = open_corpus(config, folder)
    return dict(json.loads(json.dumps(make_plan(config, opened, folder))))


@pytest.fixture
def model(tmp_path: Path, model_path: Path) -> Path:
    return Path(shutil.copytree(model_path, tmp_path / "m"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    messages = [{"role": "user", "content": "a small thing"}]
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages}] * 3)


def test_another_spelling_is_the_same_plan(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", some_texts(4))
    there = plan_of(model, corpus)
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for here in [plan_of("m", "c.jsonl"), plan_of(moved, f"file://{corpus}")]:
        assert here != there
        assert plan_differences(there, here) == []
    write_texts(corpus, some_texts(5))
    lines = "\n".join(plan_differences(there, plan_of("m", "c.jsonl")))
    assert "corpus.documents: 4 in the dump, 5 asked for" in lines
    assert f"corpus.path: '{corpus}' in the dump, 'c.jsonl' asked for" in lines


def test_another_chat_template_is_another_plan(model: Path, chats: Path) -> None:
    there = plan_of(model, chats, messages_column="messages")
    assert plan_differences(there, plan_of(model, chats, messages_column="messages")) == []
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} END{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    lines = plan_differences(there, plan_of(model, chats, messages_column="messages"))
    assert any(line.startswith("corpus.rendering.chat_template.fingerprint") for line in lines)
    assert any(line.startswith("corpus.rendering.sample") for line in lines)


def test_a_model_that_computes_otherwise_is_another_plan(model: Path, tmp_path: Path) -> None:
    """Its weights are the same; config.json says how they are used."""
    corpus = write_texts(tmp_path / "c.jsonl", some_texts(4))
    there = plan_of(model, corpus)
    content = json.loads((model / "config.json").read_text())
    saved = {**content, "transformers_version": "4.1", "use_cache": False, "_name_or_path": "x"}
    (model / "config.json").write_text(json.dumps(dict(reversed(saved.items()))))
    assert plan_of(model, corpus) == there
    (model / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 0.1}))
    (line,) = plan_differences(there, plan_of(model, corpus))
    assert line.startswith("teacher.config.rms_norm_eps: ")
    assert line.endswith("in the dump, '0.1' asked for")


def test_settings_within_others_are_told_apart() -> None:
    given = {
        "text_config": {"rope_parameters": {"factor": 4.0, "b": [1, 2]}, "use_cache": True},
        "torch_dtype": "bfloat16",
        "quantization_config": {},
        "limit": float("inf"),
    }
    assert dict(leaves(given)) == {
        "text_config.rope_parameters.factor": "4.0",
        "text_config.rope_parameters.b": "[1, 2]",
        "dtype": '"bfloat16"',
        "quantization_config": "{}",
        "limit": "Infinity",
    }


def test_arguments_that_change_answers_are_in_the_plan(model: Path, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", some_texts(4))
    plain = plan_of(model, corpus)
    assert "args" not in plain["engine"]
    fast = {"tensor-parallel-size": 2, "gpu_memory_utilization": 0.5, "max_num_seqs": 8}
    assert plan_of(model, corpus, {"engine_args": fast}) == plain
    other = plan_of(model, corpus, {"engine_args": {**fast, "kv-cache-dtype": "fp8", "new": 1}})
    assert other["engine"]["args"] == {"kv_cache_dtype": "fp8", "new": 1}
    assert plan_differences(plain, other) == [
        "engine.args: None in the dump, {'kv_cache_dtype': 'fp8', 'new': 1} asked for"
    ]
    assert plan_differences(other, plain)
    unread = {"engine_args": {"kv_cache_dtype": "fp8"}, "engine": "transformers"}
    assert "args" not in plan_of(model, corpus, unread)["engine"]


def test_a_plan_of_before_does_not_say_how_the_model_computed(model: Path, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", some_texts(4))
    here = plan_of(model, corpus, {"engine_args": {"quantization": "fp8"}})
    there = {**here, "engine": {**here["engine"]}, "teacher": {**here["teacher"]}}
    del there["teacher"]["config"], there["engine"]["args"]
    assert plan_differences(there, here) == []


def test_another_template_of_chats_with_tools_is_another_plan() -> None:
    """Plans of before do not have it."""

    def of(tools: str | None, config: Json | None) -> Json:
        template = {"fingerprint": "f"} | ({"with_tools": tools} if tools else {})
        rendering = {"sample": "s", "chat_template": template}
        teacher = {"name": "a"} if config is None else {"name": "a", "config": config}
        return {"teacher": teacher, "corpus": {"rendering": rendering}}

    assert plan_differences(of(None, None), of("t", {})) == []
    assert plan_differences(of("t", {}), of("t", {})) == []
    for there in ("u", None):
        (line,) = plan_differences(of(there, {}), of("t", {}))
        assert line.startswith("corpus.rendering.chat_template.with_tools: ")


def test_another_tokenizer_setting_is_another_plan(model: Path, tmp_path: Path) -> None:
    """The probe of tokenizer_fingerprint has no ß; the corpus has."""
    corpus = write_texts(tmp_path / "c.jsonl", ["a small thing", "straße"])
    there = plan_of(model, corpus)
    content = json.loads((model / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "ß"}, "content": "ss"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    (line,) = plan_differences(there, plan_of(model, corpus))
    assert line.startswith("corpus.rendering.sample")


def test_plans_of_earlier_releases_are_resumed(model: Path, chats: Path) -> None:
    here = plan_of(model, chats, messages_column="messages")
    there = {**here, "corpus": {**here["corpus"]}}
    del there["corpus"]["rendering"]
    assert plan_differences(there, here) == []
    assert plan_differences({**there, "k": 9}, here) == ["k: 9 in the dump, 8 asked for"]


def test_a_damaged_plan_is_another_plan(model: Path, chats: Path) -> None:
    here = plan_of(model, chats, messages_column="messages")
    for there in [{}, {"corpus": {}, "teacher": None}]:
        assert plan_differences(there, here)


def test_special_tokens_are_in_the_plan_only_where_they_are_split(model: Path, chats: Path) -> None:
    there = plan_of(model, chats, messages_column="messages")
    here = plan_of(model, chats, messages_column="messages", special_tokens="split")
    assert "special_tokens" not in there["corpus"]
    assert here["corpus"]["special_tokens"] == "split"
    assert plan_differences(there, here) == [
        "corpus.special_tokens: None in the dump, 'split' asked for"
    ]


def test_targets_are_in_the_plan_only_where_they_are_chosen(model: Path, chats: Path) -> None:
    there = plan_of(model, chats, messages_column="messages")
    assert "targets" not in there
    seed_alone = {"positions_seed": 3}
    assert there == plan_of(model, chats, seed_alone, messages_column="messages")
    fifth = plan_of(model, chats, {"positions": 0.2} | seed_alone, messages_column="messages")
    assert fifth["targets"] == {
        "version": 1, "which": "all", "positions": 0.2, "positions_seed": 3,
    }  # fmt: skip
    assert {**fifth, "targets": None} == {**there, "targets": None}
    assert len(plan_differences(there, fifth)) == len(plan_differences(fifth, there)) == 1
    other = plan_of(model, chats, {"positions": 0.2}, messages_column="messages")
    assert plan_differences(fifth, other) == ["targets.positions_seed: 3 in the dump, 0 asked for"]


def test_the_step_is_the_codecs_and_old_plans_have_the_same(model: Path, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", some_texts(4))
    there = plan_of(model, corpus, {"codec": "v1", "min_prob": 0})
    assert (there["step"], "codec" in there, "min_prob" in there) == (1 / 16, False, False)
    assert plan_of(model, corpus, {"step": 1 / 16, "codec": "v1", "min_prob": 0}) == there
    assert plan_of(model, corpus, {"codec": "v2", "min_prob": 0}) == {**there, "codec": "v2"}
    found = plan_of(model, corpus, {"codec": "v3", "min_prob": 0})
    assert found == {**there, "codec": "v3", "step": STEPS["v3"]}
    assert plan_differences(
        found, plan_of(model, corpus, {"codec": "v3", "step": 0.01, "min_prob": 0})
    ) == [f"step: {STEPS['v3']} in the dump, 0.01 asked for"]


def test_what_is_left_open_is_as_in_the_dump_that_is_there(model: Path, tmp_path: Path) -> None:
    """So the command of an earlier release resumes its dump."""
    corpus = write_texts(tmp_path / "c.jsonl", some_texts(4))
    new = plan_of(model, corpus)
    assert (new["codec"], new["min_prob"], new["step"]) == ("v3", MIN_PROB, COARSE)
    for name, given in ((1 / 416, {"min_prob": 0}), (1 / 416, {"min_prob": 0.0002}),
                        (1 / 416, {"samples": 4}), (1 / 416, {"top_p": 0.9}),
                        (COARSE, {"min_prob": 0.001}), (0.01, {"step": 0.01})):  # fmt: skip
        assert plan_of(model, corpus, given)["step"] == name
    finer = plan_of(model, corpus, {"step": STEPS["v3"]})  # the default of an earlier release
    assert plan_of(model, corpus, there=finer) == finer
    old = plan_of(model, corpus, {"codec": "v1", "min_prob": 0})
    assert plan_of(model, corpus, there=old) == old
    for settings in ({"codec": "v2", "min_prob": 0.01}, {"codec": "v2", "step": 0.5}):
        there = plan_of(model, corpus, settings)
        given = {name: settings[name] for name in settings if name == "step"}
        assert plan_of(model, corpus, given, there=there) == there
    assert plan_differences(old, plan_of(model, corpus, {"codec": "v3"}, there=old))
    # What a cut-off does not go with has none by default.
    for given in ({"samples": 4}, {"top_p": 0.9}):
        assert "min_prob" not in plan_of(model, corpus, given)
    with pytest.raises(ConfigError, match="leave it out for the default"):
        plan_of(model, corpus, {"step": 1 / 16})


@pytest.mark.parametrize("step", [1 / 16, 1, 1e-5])
def test_a_step_of_nats_is_refused_with_roots(step: float) -> None:
    with pytest.raises(
        ConfigError, match=r"step .* from 1/65535 to 0.05; leave it out for the default"
    ):
        DumpConfig("m", CorpusConfig("c"), "unused", codec="v3", step=step)
