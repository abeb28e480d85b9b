"""What a check measures, each number with its bounds; the check fails after all are taken."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A measured number. It is right between `least` and `most`; without these it only informs."""

    name: str
    value: float
    most: float | None
    least: float | None
    unit: str

    @property
    def right(self) -> bool:
        """False for NaN, too."""
        if self.most is None and self.least is None:
            return True
        low = self.least is None or self.value >= self.least
        return low and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        bounds = [
            f"{sign} {bound:.3g}"
            for sign, bound in (("≥", self.least), ("≤", self.most))
            if bound is not None
        ]
        found = f"{self.name} {self.value:.3g}{unit}"
        found += f" ({' and '.join(bounds)})" if bounds else ""
        return found if self.right else f"**{found}**"


class Measured:
    """The numbers of one check. Call it with a name, a value and bounds."""

    def __init__(self) -> None:
        self.numbers: list[Number] = []

    def __call__(
        self,
        name: str,
        value: Any,
        most: float | None = None,
        *,
        least: float | None = None,
        unit: str = "",
    ) -> None:
        """Takes numbers and tensors of one element. NaN is wrong where there is a bound."""
        self.numbers.append(Number(name, float(value), most, least, unit))

    def check(self) -> None:
        """AssertionError where a number is out of its bounds."""
        wrong = [str(number).strip("*") for number in self.numbers if not number.right]
        assert not wrong, "out of bounds: " + "; ".join(wrong)

    def lines(self) -> list[str]:
        return [str(number) for number in self.numbers]
