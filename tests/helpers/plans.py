"""Plans with one field changed; a dot in its name leads into an object."""

import copy
from typing import Any

Plan = dict[str, Any]


def with_field(plan: Plan, name: str, value: Any) -> Plan:
    changed = copy.deepcopy(plan)
    holder, last = holder_of(changed, name)
    holder[last] = value
    return changed


def without_field(plan: Plan, name: str) -> Plan:
    changed = copy.deepcopy(plan)
    holder, last = holder_of(changed, name)
    del holder[last]
    return changed


def holder_of(plan: Plan, name: str) -> tuple[Plan, str]:
    *parts, last = name.split(".")
    for part in parts:
        plan = plan[part]
    return plan, last
