"""A random share of the targets: the same in every retry, each target on its own."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import CorpusConfig, DumpConfig
from pipeline.corpus import Corpus, Sequence
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.positions import Share
from tests.helpers.corpora import some_texts, write_texts

TOKENS = 400


def draws(share: Share, documents: int = 200, chunk: int = 0) -> np.ndarray:
    """bool [documents, TOKENS - 1], without the first token."""
    found = [share.draw(str(number), chunk, None, TOKENS) for number in range(documents)]
    return np.array(found)[:, 1:]


def test_the_draw_of_a_document_is_this_one() -> None:
    """For ever: a dump that is resumed with a later release draws the same."""
    kept = np.flatnonzero(Share(0.2, 7).draw("document 3", 1, None, 40))
    assert kept.tolist() == [7, 9, 18, 23, 24, 33]


@given(
    st.text(max_size=20),
    st.integers(0, 100),
    st.floats(0, 1, exclude_min=True),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.lists(st.booleans(), min_size=2, max_size=60),
)
@settings(deadline=None)
def test_it_keeps_targets_alone_and_the_more_the_larger_the_share(
    doc_id: str, chunk: int, positions: float, seed: int, marks: list[bool]
) -> None:
    targets = np.array(marks)
    share, larger = Share(positions, seed), Share(min(1.0, 2 * positions), seed)
    kept = share.draw(doc_id, chunk, targets, len(targets))
    assert kept.dtype == bool
    assert not (kept & ~targets).any()
    assert not kept[0]
    assert not (kept & ~larger.draw(doc_id, chunk, targets, len(targets))).any()
    every = share.draw(doc_id, chunk, None, len(targets))
    assert (kept == every & targets).all()  # what one target draws does not depend on the others
    whole = Share(1.0, seed).draw(doc_id, chunk, targets, len(targets))
    assert (whole[1:] == targets[1:]).all()


@pytest.mark.parametrize("positions", [0.01, 0.2, 0.5, 0.97])
def test_each_target_is_kept_on_its_own(positions: float) -> None:
    """Five standard deviations: in all, at each place, in each document, and for neighbours."""
    kept = draws(Share(positions, 3))

    def within(mean: np.ndarray | float, expected: float, number: int) -> bool:
        sigma = np.sqrt(expected * (1 - expected) / number)
        return bool((np.abs(mean - expected) <= 5 * sigma + 1 / number).all())

    documents, places = kept.shape
    assert within(kept.mean(), positions, kept.size)
    assert within(kept.mean(0), positions, documents)
    assert within(kept.mean(1), positions, places)
    for both in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1]):
        assert within(both.mean(), positions**2, both.size)


def test_another_seed_chunk_or_document_draws_others() -> None:
    share = Share(0.5, 3)
    for other in (draws(Share(0.5, 4)), draws(share, chunk=1), np.roll(draws(share), 1, 0)):
        both = (draws(share) == other).mean()
        assert abs(both - 0.5) < 5 * 0.5 / np.sqrt(other.size)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus") / "c.jsonl", some_texts(150))


def opened(corpus: Path, model: Path, share: Share | None, max_length: int = 30) -> Corpus:
    tokenizer = ModelFolder(model).tokenizer
    return Corpus(CorpusConfig(str(corpus)), tokenizer, max_length, share=share)


def masks(sequences: list[Sequence]) -> dict[tuple[str, int], list[bool]]:
    return {(each.doc_id, each.chunk): each.targets.tolist() for each in sequences}  # type: ignore[union-attr]


def test_partitions_and_batches_do_not_matter(corpus: Path, model_path: Path) -> None:
    share = Share(0.2, 1)
    whole = opened(corpus, model_path, share)
    sequences = list(whole.sequences())
    parts = opened(corpus, model_path, share)
    found = [
        each for start in range(0, 150, 37) for each in parts.sequences(start, min(start + 37, 150))
    ]
    assert masks(found) == masks(sequences)
    assert [each.ends_document for each in found] == [each.ends_document for each in sequences]


def test_a_document_ends_with_the_last_chunk_that_keeps_a_target(
    corpus: Path, model_path: Path
) -> None:
    every = list(opened(corpus, model_path, None).sequences())
    few = list(opened(corpus, model_path, Share(0.03, 1)).sequences())
    assert 0 < len(few) < len(every)
    whole = {(each.doc_id, each.chunk): each for each in every}
    for each in few:
        assert len(each.positions)
        assert each.targets is not None
        assert len(each.targets) == len(each.input_ids)
        np.testing.assert_array_equal(each.input_ids, whole[each.doc_id, each.chunk].input_ids)
    documents = [each.document for each in few]
    last = [here != after for here, after in zip(documents, [*documents[1:], -1], strict=True)]
    assert [each.ends_document for each in few] == last
    assert any(
        each.ends_document and not whole[each.doc_id, each.chunk].ends_document for each in few
    )


@pytest.mark.parametrize("value", [0.0, -0.2, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="positions: "):
        DumpConfig("m", CorpusConfig("c"), "out", positions=value)
