"""`make test-slurm` alone runs these tests: they take minutes, and a real SLURM of two nodes, up for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, SlurmUnavailable, install


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slurm" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason="needs a real SLURM: make test-slurm"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        install()
        with Cluster() as cluster:
            yield cluster
    except SlurmUnavailable as error:
        pytest.fail(str(error), pytrace=False)
