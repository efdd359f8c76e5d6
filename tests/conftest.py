import pytest
from ranks import Ranks


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: NCCL, one GPU per rank")


@pytest.fixture(scope="session")
def ranks(request, tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("stores"), request.config.getoption("--device"))
    yield pool
    pool.close()


@pytest.fixture
def run(ranks):
    return ranks.run
