import pytest
from ranks import Ranks


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: NCCL, one GPU per rank")


def pytest_collection_modifyitems(config, items):
    """Run the matrix on GPUs, which every test of that file is written for."""
    if config.getoption("--device") == "cuda":
        others = [item for item in items if item.path.name != "test_batchnorm.py"]
        items[:] = [item for item in items if item.path.name == "test_batchnorm.py"]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def ranks(request, tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("stores"), request.config.getoption("--device"))
    yield pool
    pool.close()


@pytest.fixture
def run(ranks):
    return ranks.run
