import inspect
from typing import Any

import pytest

import mfd_fast
from mfd_fast.keywords import Keywords, PairKeywords


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (mfd_fast.mean_velocity, Keywords),
        (mfd_fast.integrate, Keywords),
        (mfd_fast.mean_velocity_pair, PairKeywords),
    ],
)
def test_type_checkers_see_the_keywords_of_the_function(function: Any, keywords: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    own = {parameter.name: parameter.annotation for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert own.pop("return_stats") is bool
    assert own == keywords.__annotations__
