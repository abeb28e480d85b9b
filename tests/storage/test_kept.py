"""Values are kept while they fit."""

from storage.kept import Kept


def test_kept_values_have_a_bound() -> None:
    dropped: list[str] = []
    kept: Kept[str] = Kept(10, dropped.append)
    made = []

    def get(key: str) -> str:
        return kept.get(key, lambda: made.append(key) or key, len)  # type: ignore[func-returns-value]

    for key in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb", "x" * 40, "x" * 40):
        assert get(key) == key
    assert made == ["aaaa", "bbbb", "cccc", "bbbb", "x" * 40]
    assert dropped == ["bbbb", "cccc", "aaaa", "bbbb"]
    assert kept.total == 40
