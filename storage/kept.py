"""Values that are kept while they fit."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The values used last, up to a total size; `drop` gets each that is given up."""

    def __init__(self, most: int, drop: Callable[[Value], object] = lambda value: None) -> None:
        self.most, self.drop, self.total = most, drop, 0
        self.values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The value of a key, made if it is not kept."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key][0]
        value = make()
        self.values[key] = value, size(value)
        self.total += self.values[key][1]
        while self.total > self.most and len(self.values) > 1:
            _, (old, length) = self.values.popitem(last=False)
            self.total -= length
            self.drop(old)
        return value
