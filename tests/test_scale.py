"""Growth: a model whose parameters come back from its own predictions, hosts with delay that leave nothing behind.

A lower bound on a delayed exchange is no matter of the machine's speed; no test looks at an upper one.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiment.bench.scaling import cost_model, measure, network, tables
from experiment.bench.scaling.cost_model import Exchange, Link, Point
from experiment.bench.scaling.network import Network, NotAvailableError
from experiment.bench.timing import Quartiles

ROOT = Path(__file__).parents[1]
DELAY = 5  # ms
LINK = Link(overhead=50e-6, latency=200e-6, per_byte=2e-9)
TINY = [
    "model=resnet8", "model.width=8", "timeout=60", "scale.num_features=[3]", "scale.image_size=8", "scale.rounds=2",
    "scale.world_sizes=[1,2]", "scale.hosts=[2]", f"scale.delays_ms=[0,{DELAY}]", "scale.num_devices=[8]",
]  # fmt: skip


def bare(collective, num_bytes, world_size):
    exchange = Exchange(collective, num_bytes)
    return Point([exchange], world_size, cost_model.exchange_seconds(exchange, world_size, LINK))


def test_messages_and_bytes_of_gloos_rings():
    assert [cost_model.num_messages("all_gather", w) for w in (2, 4)] == [2, 6]
    assert [cost_model.num_messages("all_reduce", w) for w in (2, 4)] == [4, 12]
    assert cost_model.num_bytes_sent(Exchange("all_gather", 800), 4) == 2400  # its own, and two it passes on
    assert cost_model.num_bytes_sent(Exchange("all_reduce", 800), 4) == 1200  # six pieces of a quarter


def test_link_and_work_are_found_again():
    points = [bare(c, n, w) for c in measure.COLLECTIVES for n in (1032, 32776) for w in (2, 4)]
    assert cost_model.fit_link(points) == pytest.approx(LINK, rel=1e-6)  # no noise: what is left is rounding
    exchanges = [Exchange("all_gather", 1032), Exchange("all_gather", 1024)]
    layers = [Point(exchanges, w, cost_model.seconds(3e-3, exchanges, w, 2, LINK)) for w in (2, 4)]
    assert cost_model.fit_work(layers, 2, LINK) == pytest.approx(3e-3)


def test_a_layer_is_its_work_and_its_exchanges():
    exchanges = [Exchange("all_gather", 1032), Exchange("all_gather", 1024)]
    free = Link(0.0, 0.0, 0.0)
    assert cost_model.seconds(1e-3, exchanges, 2, 2, free, delay=5e-3) == pytest.approx(1e-3 + 2 * 2 * 5e-3)
    assert cost_model.seconds(1e-3, exchanges, 4, 2, free) == pytest.approx(2e-3)  # two ranks on each core
    assert cost_model.seconds(1e-3, [], 1, 2, LINK, delay=1.0) == 1e-3


def test_nccl_by_hand():
    ring, tree = cost_model.nccl_all_reduce(0, 8), cost_model.nccl_all_reduce(0, 1024)
    assert ring == ("ring", pytest.approx(6.6e-6 + 14 * 0.6e-6))
    assert tree == ("tree", pytest.approx(6.8e-6 + 14 * 0.6e-6 + 2 * 7 * 5e-6))  # 128 nodes
    costs = [cost_model.resnet50_on_gpus(n) for n in (8, 64, 1024, 10000)]
    assert costs == sorted(costs)


def test_resnet50_has_these_layers():
    import torchvision
    from torch import nn

    layers = [m.num_features for m in torchvision.models.resnet50().modules() if isinstance(m, nn.BatchNorm2d)]
    assert cost_model.resnet50_on_gpus(64) == pytest.approx(sum(cost_model.layer_on_gpus(n, 64) for n in layers))


def point(what, world_size, delay, ms, exchanges):
    quartiles = Quartiles(ms, ms, ms)
    place = {"kind": "point", "network": "switch", "delay_ms": delay, "world_size": world_size}
    return {**place, "what": what, "num_features": 64, "ms": quartiles, "exchanges": exchanges}


def points(off=1.0):
    """Make points that follow the model, but for those with delay, which take `off` times as long."""
    rows = []
    for world_size in (2, 4):
        for delay in (0, 5):
            factor = 1e3 * (off if delay else 1.0)
            for collective in measure.COLLECTIVES:
                of = Exchange(collective, 1032)
                ms = factor * cost_model.exchange_seconds(of, world_size, LINK, delay / 1e3)
                rows.append(point(collective, world_size, delay, ms, [of]))
            both = [Exchange("all_gather", 1032), Exchange("all_gather", 1024)]
            ms = factor * cost_model.seconds(2e-3, both, world_size, 2, LINK, delay / 1e3)
            rows += [point("layer", world_size, delay, ms, both), point("bn layer", world_size, delay, 1.0, [])]
    return rows


def test_points_with_delay_are_predicted_and_not_fitted():
    true, slow = measure.predict(points(), cores=2), measure.predict(points(off=2.0), cores=2)
    assert true[-1] == slow[-1]  # the fit
    judged = [[row for row in rows if row.get("role") == "judged"] for rows in (true, slow)]
    assert [(row["what"], row["delay_ms"]) for row in judged[0]] == [("layer", 5)] * 2
    assert [row["error_percent"] for row in judged[0]] == pytest.approx([0, 0], abs=1e-6)
    assert [row["error_percent"] for row in judged[1]] == pytest.approx([-50, -50])
    assert "role" not in true[3]  # nn.BatchNorm exchanges nothing


def test_tables_say_how_many_points_are_within_the_limit():
    layers, bare_ones, fits = tables.tabulate(measure.predict(points(off=2.0), cores=2))
    assert "0 of 2 within 25 %, the worst 50 % off" in layers.note
    assert [len(table.rows) for table in (layers, bare_ones, fits)] == [4, 8, 1]
    assert layers.rows[0][4] == "1.00"  # nn.BatchNorm beside it


def configured(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("bench", overrides=[*TINY, *overrides])


def test_without_the_right_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    rows = measure.measure(configured("scale.world_sizes=[]"))
    [missing] = [row for row in rows if row["kind"] == "missing"]
    assert missing["reason"].startswith("not available: needs root")
    assert missing["reason"] in tables.tabulate(rows)[0].note


@pytest.fixture
def hosts():
    try:
        with Network(2, [0.0, DELAY / 1e3]) as made:
            yield made
    except NotAvailableError:
        pytest.skip("network namespaces cannot be made")
    assert not left_by(os.getpid())


def left_by(pid):
    return [path.name for path in network.NAMESPACES.glob(f"syncbn-{pid}-*")]


@pytest.mark.slow
def test_everything_is_measured_and_delayed(hosts):
    rows = measure.measure(configured())
    found = [(row["network"], row["delay_ms"], row["world_size"]) for row in rows if row["kind"] == "point"]
    assert dict.fromkeys(found).keys() == {("loopback", 0, 1), ("loopback", 0, 2), ("switch", 0, 2), ("switch", 5, 2)}
    assert sum(row["kind"] == "fit" for row in rows) == 2
    late = {row["what"]: row["ms"].median for row in rows if row["kind"] == "point" and row["delay_ms"] == DELAY}
    assert late["all_gather"] >= DELAY  # the other's data cannot come sooner
    assert late["layer"] >= 2 * DELAY
    assert late["step"] >= 18 * DELAY  # nine layers
    assert len(tables.tabulate(rows)) == 4


HOLD = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
sys.path[:0] = {[str(ROOT), str(ROOT / "launch")]!r}
from experiment.bench.scaling.network import Network
with Network(2, [0.001]):
    print("there", flush=True)
    time.sleep(60)
"""


def held():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"there\n"
    assert len(left_by(process.pid)) == 3
    return process


def end(process, number):
    process.send_signal(number)
    process.communicate(timeout=20)


def test_an_interrupt_leaves_nothing_and_a_kill_is_cleaned_up_after(hosts):
    interrupted, killed = held(), held()
    end(interrupted, signal.SIGINT)
    assert not left_by(interrupted.pid)
    end(killed, signal.SIGKILL)
    with Network(1, [0.0]):
        assert not left_by(killed.pid)
    assert len(left_by(os.getpid())) == 3  # those of the fixture, as they were


def test_a_frame_takes_the_delay_both_ways(hosts):
    ping = ["ip", "netns", "exec", hosts.namespace(0), sys.executable, "-c", PING]
    answer = ["ip", "netns", "exec", hosts.namespace(1), sys.executable, "-c", ANSWER]
    with subprocess.Popen(answer, stdout=subprocess.PIPE) as answering:
        assert answering.stdout.readline() == b"listening\n"
        done = subprocess.run(ping, capture_output=True, timeout=20, check=True)
    assert float(done.stdout) >= 2 * DELAY / 1e3


ANSWER = """
import socket
with socket.create_server(("10.1.0.2", 5000)) as server:
    print("listening", flush=True)
    server.settimeout(20)
    connection, _ = server.accept()
    connection.sendall(connection.recv(1))
"""
PING = """
import socket, time
connection = socket.create_connection(("10.1.0.2", 5000), timeout=20)
start = time.monotonic()
connection.sendall(b"x")
assert connection.recv(1) == b"x"
print(time.monotonic() - start)
"""
