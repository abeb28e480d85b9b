"""A vLLM without this project's plug-in is refused, with what to do."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.teacher import plugin
from tests.helpers import scripts
from tests.helpers.models import tiny_model

pytest.importorskip("vllm")


def point(value: str) -> EntryPoint:
    return EntryPoint(plugin.NAME, value, plugin.GROUP)


def test_the_installed_plugin_is_the_one_that_runs() -> None:
    assert "Qwen3ForCausalLM" in plugin.class_overrides(["Qwen3ForCausalLM"])
    assert not plugin.class_overrides(["NobodyKnowsForCausalLM"])


@pytest.mark.parametrize(
    ("points", "allowed", "words"),
    [
        ([], None, "no installed package has the entry point"),
        ([point("pipeline.topk_model:register")], None, "older install"),
        ([point(plugin.TARGET)], "others", "Add mol_topk to it"),
        ([point("pipeline.teacher.nothing:register")], None, "make setup"),
    ],
)
def test_the_reason_is_named(
    points: list[EntryPoint], allowed: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.teacher import topk_model

    monkeypatch.setattr("vllm.plugins.load_general_plugins", lambda: None)
    monkeypatch.setattr(topk_model, "registered", False)
    monkeypatch.setattr(plugin, "entry_points", lambda group: points)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    with pytest.raises(ConfigError, match="vLLM did not load the top-k plug-in mol_topk") as told:
        plugin.class_overrides(["Qwen3ForCausalLM"])
    assert words in str(told.value)


def test_an_import_that_fails_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "TARGET", "pipeline.nowhere:register")
    monkeypatch.setattr(plugin, "entry_points", lambda group: [point("pipeline.nowhere:register")])
    assert "No module named 'pipeline.nowhere'" in plugin.why_not_loaded()


@pytest.mark.vllm
def test_a_dump_does_not_take_the_slower_way_silently(tmp_path: Path) -> None:
    """The real script and the real vLLM, with a VLLM_PLUGINS that leaves the plug-in out."""
    model = tiny_model(tmp_path / "model")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "some words that are long enough"}\n')
    words = [f"--model={model}", f"--corpus.path={corpus}", f"--output={tmp_path / 'dump'}"]
    words += ["--k=8", "--max_length=64"]
    done = scripts.run("dump_logits.py", *words, env={"VLLM_PLUGINS": "another"})
    assert done.returncode == 2, done.stderr[-2000:]
    assert "VLLM_PLUGINS is 'another'. Add mol_topk to it, or unset it" in done.stderr
    assert not list((tmp_path / "dump").rglob("*.parquet"))
