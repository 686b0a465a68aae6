"""`pytest --benchmark` runs the benchmarks instead of the tests; `pytest --slow` runs the slow tests too."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run benchmarks/ instead of tests/")
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        if not config.pluginmanager.hasplugin("benchmark"):
            raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args[:] = ["benchmarks"]
        config.option.benchmark_only = True
    if getattr(config.option, "benchmark_only", False):
        config.option.benchmark_quiet = True  # benchmarks/conftest.py prints one table, by call instead of by replay
