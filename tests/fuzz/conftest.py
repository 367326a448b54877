"""Says at the end what was thrown, and what it came to."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest

from .figures import ALL, publish

_PROPERTY = "fuzzing"


@pytest.fixture(autouse=True)
def figures_of_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sends them along with the test's report, as far as another process that collects them."""
    yield
    request.node.user_properties.extend((_PROPERTY, publish(figures)) for figures in ALL)
    ALL.clear()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [each for each in chain(*terminalreporter.stats.values()) if isinstance(each, pytest.TestReport)]
    told = chain.from_iterable(report.user_properties for report in reports if report.when == "teardown")
    rows = [row for key, row in told if key == _PROPERTY]
    if not rows:
        return
    terminalreporter.section("fuzzing")
    terminalreporter.line(
        "| What | Inputs | Taken | Seconds | Slowest, ms | Memory, MiB | Log, bytes | Honest steps | Slowest step, ms |"
    )
    terminalreporter.line("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        terminalreporter.line(row)
