"""The results of tasks in words and in tables."""

from pipeline.types import Json


def in_words(name: str, base: str, found: Json) -> str:
    """What a model kept, in a sentence; `found` is of `paired`."""
    number, right = f"{found['questions']:,}", f"{found['base_right']:,}"
    if not found["base_right"]:
        return f"{base} answered none of the {number} questions, so {name} had none to keep."
    low, high = found["kept_interval"]
    certainty = f", p = {found['p']:.2g}" if "p" in found else ""
    return (
        f"{name} kept {count(found['kept'])} of the {right} questions that {base} answered "
        f"({found['kept_share']:.0%}; 95 % interval {low:.0%} to {high:.0%}). It lost "
        f"{count(found['lost'])} and won {count(found['won'])} others, of {number} in "
        f"all{certainty}."
    )


def count(value: float) -> str:
    """A number of questions; with a digit more where it is a mean over seeds."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


HEAD = ("task", "model", "right", "by chance", "kept", "lost", "won", "p", "change", "95 %")


def lines(report: Json) -> list[list[str]]:
    """The rows of a table under HEAD, task by task, the base first."""
    models, base = report["models"], report["base"]
    order = [base, *(name for name in models if name != base)]
    found = [
        [task, *line(name, models[name]["tasks"][task], name == base)]
        for task in models[base]["tasks"]
        for name in order
    ]
    if len(models[base]["tasks"]) > 1:
        found += [
            ["all tasks", *line(name, models[name]["all_tasks"], name == base)] for name in order
        ]
    return found


def line(name: str, found: Json, is_base: bool) -> list[str]:
    chance = found.get("chance")
    shares = [
        f"{count(found['right'])} of {found['questions']:,}",
        "" if chance is None else f"{chance * found['questions']:,.0f}",
    ]
    if is_base:
        return [name, *shares, *[""] * 6]
    low, high = found["change_interval"]
    return [
        name,
        *shares,
        f"{count(found['kept'])} of {found['base_right']:,}",
        count(found["lost"]),
        count(found["won"]),
        f"{found['p']:.2g}" if "p" in found else "",
        f"{found['change']:+.1%}",
        f"{low:+.1%} to {high:+.1%}",
    ]


def table(report: Json) -> str:
    """The tasks as text: what was found in words, then a line per task and model."""
    base = report["base"]
    said = [
        in_words(name, base, found["all_tasks"])
        for name, found in report["models"].items()
        if name != base
    ]
    rows = [list(HEAD), *lines(report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(["", *said, "", shown[0], "-" * len(shown[0]), *shown[1:]])
