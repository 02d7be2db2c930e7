"""What depends on conditions alone is computed once per rollout, where a field offers that."""

from collections.abc import Sequence

from mfd_fast.types import Condition, ConditionGroup, prepares_conditions


def prepared(groups: Sequence[ConditionGroup]) -> list[Condition]:
    """The conditions that a rollout passes to these fields of one backbone; unchanged where nothing is prepared."""
    field = groups[0][0]
    if prepares_conditions(field):
        return field.prepare_conditions(groups)
    return [condition for _, condition in groups]


class PreparesInner:
    """For wrappers: what the wrapped field prepares."""

    def prepare_conditions(self, groups: Sequence[ConditionGroup]) -> list[Condition]:
        """As `mfd_fast.types.PreparesConditions`; a field that is no such wrapper stands for itself."""
        return prepared([(getattr(field, "field", field), condition) for field, condition in groups])
