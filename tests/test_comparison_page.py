"""The comparison's page: as text, and opened in a real browser."""

import base64
import csv
import hashlib
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from test_comparison_statistics import cell, cells

from experiment.comparison import plots
from experiment.comparison.page import write_report
from experiment.comparison.plan import Plan
from experiment.pages import figure_files, figures

NASTY = """$\\alpha$ <b>x</b> <script>alert(1)</script> "quoted' & {{ 7 * 7 }} """ + "long" * 40
PLANNED = Plan((("bn", "syncbn"), ("gn", "syncbn")), 1, (4,))
ABOUT = {"title": "A report", "command": "python launch/compare.py", "plan": PLANNED}
FIRST = {"bn": [0.30, 0.35, 0.32], "syncbn": [0.043, 0.041, 0.047], "gn": [0.08, 0.07, 0.083]}


def grid():
    """Make cells of three arms, four batches and three seeds: bn is bad at one image per rank."""
    last = {**FIRST, "bn": [0.041, 0.045, 0.04]}
    rows = cells(
        {(arm, batch): (FIRST if batch == 1 else last)[arm] for arm in ("bn", "syncbn") for batch in (1, 2, 4, 8)}
    )
    rows += [cell("gn", 8, seed, error, once_per_seed=True) for seed, error in enumerate(FIRST["gn"])]
    for arm in FIRST:
        for lr, error in ((0.1, 0.08), (0.2, 0.05), (0.4, None)):
            name = {"cell": f"select-{arm}-lr{lr:g}-s100", "candidate": f"lr {lr:g}"}
            evaluations = {"rank0": {"val_error": error, "val_loss": error, "train_error": error, "num_val": 10}}
            rows.append(cell(arm, 2, 100, **name, evaluations=evaluations))
    return rows


def nasty():
    """Make cells with all that a user may type, in two world sizes."""
    rows = cells(
        {(NASTY, 1): [0.3, 0.35], (NASTY, 2): [0.2, 0.25], ("数\ud800\x07", 1): [0.1], ("syncbn", 1): [0.04, 0.05]}
    )
    rows += [cell("bn", 2, 0, 0.2, world_size=1, device=NASTY, command=NASTY, versions={NASTY: NASTY})]
    return [*rows, {"cell": NASTY, "status": "failed", "reason": NASTY, "arm": NASTY, "command": NASTY}]


def only(status):
    rows = [
        {"cell": f"{i}", "status": "failed", "reason": "ValueError: no", "arm": "bn", "command": "c"} for i in range(2)
    ]
    return rows if status == "failed" else []


EDGES = {
    "nasty": nasty,
    "one cell": lambda: [cell("gn")],
    "one arm": lambda: cells({("bn", 1): [0.3, 0.4], ("bn", 2): [0.1, 0.2]}),
    "one batch": lambda: cells({("bn", 3): [0.3, 0.4], ("syncbn", 3): [0.1, 0.1]}),
    "holes": lambda: cells({("bn", 1): [0.3, None], ("syncbn", 2): [None, 0.1], ("gn", 8): [0.0, 0.0]}),
    "no numbers": lambda: cells({("bn", 1): [None], ("syncbn", 2): [None]}),
    "no curves": lambda: [cell(curve={"step": [], "loss": []}), cell(seed=1, curve={"step": [1], "loss": [None]})],
    "other score": lambda: [cell(score="mIoU", evaluations={"batch": {"test_error": 0.5, "train_error": 0.5}})],
    "all failed": lambda: only("failed"),
    "nothing": lambda: only("none"),
}  # fmt: skip


@pytest.fixture(scope="module")
def edges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    made = [make() for make in EDGES.values()]
    pages = [
        write_report(
            rows,
            folder / f"{i}",
            title=f"Report {NASTY}",
            command=NASTY,
            missing=1,
            plan=replace(PLANNED, per_rank_batch_size=3),
        )
        for i, rows in enumerate(made)
    ]
    return dict(zip(EDGES, pages, strict=True))


@pytest.fixture(params=EDGES)
def edge(request, edges):
    return edges[request.param]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(grid(), tmp_path_factory.mktemp("page"), **ABOUT)


class Reader(HTMLParser):
    """Collect tags, ids and references, and check that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_the_page_needs_nothing_else(edge):
    text = edge.read_text()
    read = Reader(text)
    [icon] = [attrs for tag, attrs in read.tags if tag == "link"]
    assert icon == {"rel": "icon", "href": "data:,"}  # else a browser asks for a file of its own
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in read.tags}
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in read.tags
    assert all(link.startswith(("#", "data:text/csv")) for link in read.links if link != "data:,")
    style = re.sub("http://www.w3.org/(2000/svg|1999/xlink)", "", text)
    assert not re.search(r"https?://|@import|url\((?!#)", style)
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert len(read.ids) == len(set(read.ids))
    references = [link[1:] for link in read.links if link.startswith("#")] + re.findall(r"url\(#([^)]+)\)", text)
    assert set(references) <= set(read.ids)


@pytest.mark.slow
def test_what_users_type_is_text(edges):
    text = edges["nasty"].read_text()
    assert text.count("&lt;script&gt;alert(1)") > 5
    assert "<script" not in text
    assert "{{ 7 * 7 }}" in text
    drawn = (edges["nasty"].parent / "plots" / "error_4_ranks.svg").read_text()
    assert "$\\alpha$" in drawn  # no mathematics
    assert "&lt;b&gt;x&lt;/b&gt;" in drawn
    assert "数" in drawn


def test_the_downloads_are_the_files(page):
    links = {attrs["download"]: attrs["href"] for tag, attrs in Reader(page.read_text()).tags if "download" in attrs}
    for name in ("results.csv", "summary.csv"):
        content = base64.b64decode(links[name].partition(",")[2])
        assert content == (page.parent / name).read_bytes()
    lines = list(csv.DictReader(io.StringIO((page.parent / "results.csv").read_text())))
    assert len(lines) == 24 + 3 + 9  # cells, cells that run once per seed, candidates
    assert len(list(csv.DictReader(io.StringIO((page.parent / "summary.csv").read_text())))) == 12


def test_the_page_says_what_it_must(page):
    text = re.sub(r"\s+", " ", Reader(page.read_text()).text)
    for said in (
        "Exploratory: bn degrades at small batches",
        "Exploratory: syncbn changes with the batch by less than",
        "Stated beforehand: at 1 image per rank bn has 28.0 points more",
        "Numbers: validation error in %, the chosen one bold.",
        "32.3 ± 6.3",
        "no property of the method",
        "gradients are accumulated to one SGD batch",
        "python launch/compare.py",
        "python launch/train.py +norm=gn",
        "torch 2.14.1",
    ):
        assert said in text
    assert "Read with care" not in text


@pytest.mark.slow
def test_empty_results_say_so(edge, request):
    text = Reader(edge.read_text()).text
    name = request.node.callspec.params["edge"]
    assert "1 cell of the grid is missing" in text
    assert ("No cell has finished, so nothing can be told." in text) == (name in ("all failed", "nothing"))
    assert ("ValueError: no" in text) == (name == "all failed")
    assert ("Holm-corrected" in text) == (name == "one batch")


@pytest.mark.slow
def test_equal_rows_give_equal_files(page, tmp_path):
    def digests(folder):
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    rows = json.loads(json.dumps(grid()[::-1]))
    other = write_report(rows, tmp_path / "again", **ABOUT)
    assert digests(page.parent) == digests(other.parent)
    names = {str(path) for path in digests(page.parent)}
    assert {"index.html", "results.csv", "summary.csv", "plots/error_4_ranks.png", "plots/error_4_ranks.svg"} < names
    assert "plots/loss_4_ranks_8_per_rank.png" in names
    picture = matplotlib.image.imread(page.parent / "plots" / "error_4_ranks.png")
    assert picture.shape in [(720, 920, 4), (720, 919, 4)]  # matplotlib 3.8 rounds down


@pytest.mark.parametrize(
    ("values", "scale"), [([4, 5, 9, 19], "linear"), ([4, 5, 9, 40], "log"), ([0, 1, 40], "linear")]
)
def test_the_axis_is_logarithmic_only_if_it_must(values, scale):
    axes = Figure().add_subplot()
    figures.set_limits(axes, values, [values[0] / 3, values[-1] * 2, float("nan")], 100)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert (low == 0) == (scale == "linear")
    assert low <= values[0]
    assert high >= values[-1]
    labels = [axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks()]
    assert all(re.fullmatch(r"[\d.]+", label) for label in labels)


@pytest.mark.parametrize("wanted", [[5], [5, 5], [0, 1, 2, 99], [100, 100, 100, 0], [50, 20, 51, 22, 52], []])
def test_labels_are_spread(wanted):
    heights = [10 + i for i in range(len(wanted))]
    places = plots.spread(wanted, heights, 0, 100)
    ends = sorted((place - height / 2, place + height / 2) for place, height in zip(places, heights, strict=True))
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(ends))
    assert all(low >= -1e-9 and high <= 100 + 1e-9 for low, high in ends)
    assert [p for p, _ in sorted(zip(places, wanted, strict=True))] == sorted(places)


def test_ids_inside_texts_stay_as_they_are():
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><g id="a"/><path clip-path="url(#a)"/>'
    svg += b'<text>id="a" url(#a)</text></svg>'
    inline = figure_files.to_inline_svg(svg, "p", "<title>")
    assert 'id="p-a"' in inline
    assert 'clip-path="url(#p-a)"' in inline
    assert '>id="a" url(#a)<' in inline
    assert "&lt;title&gt;</title>" in inline


# --- in a browser

MEASURE = """<!DOCTYPE html><body style="margin:0"><pre></pre>FRAMES<script>
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const plots = [...page.querySelectorAll("figure")].map(figure => {
    const shown = [...figure.querySelectorAll("svg")].filter(svg => svg.getClientRects().length);
    const box = shown[0].getBoundingClientRect();
    const texts = [...shown[0].querySelectorAll("text")].map(text => {
      const r = text.getBoundingClientRect();
      return {left: r.left - box.left, right: box.right - r.right, top: r.top - box.top, bottom: box.bottom - r.bottom,
              size: parseFloat(view.getComputedStyle(text).fontSize) * box.width / shown[0].viewBox.baseVal.width};
    });
    return {shown: shown.length, width: box.width, left: box.left, right: box.right, texts};
  });
  const wide = [...page.querySelectorAll(".wide")].map(e => e.getBoundingClientRect().right);
  const back = view.getComputedStyle(page.body).backgroundColor;
  return {scroll: page.documentElement.scrollWidth, plots, wide, back};
}
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script></body>"""


@pytest.fixture
def browse(tmp_path):
    """Open a file in chromium without a network: `(document, what it logged)`."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")

    def open_page(path, *flags):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [
            f"--user-data-dir={tmp_path}/profile",
            "--allow-file-access-from-files",
            "--window-size=1700,1000",
            "--hide-scrollbars",
        ]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--dump-dom", *flags]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


def measure(browse, pages, folder, *flags):
    """Open each page 400 and 1600 pixels wide."""
    style = "border:0;height:900px;width:"
    frames = [f'<iframe src="{p.as_uri()}" style="{style}{width}px"></iframe>' for p in pages for width in (400, 1600)]
    wrapper = folder / "wrapper.html"
    wrapper.write_text(MEASURE.replace("FRAMES", "".join(frames)))
    document, logged = browse(wrapper, *flags)
    assert logged == []
    return json.loads(html.unescape(re.search("<pre>(.*?)</pre>", document, re.DOTALL)[1]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_it_on_a_phone_and_on_a_screen(browse, page, tmp_path, theme):
    narrow, wide = measure(browse, [page], tmp_path, f"--blink-settings=preferredColorScheme={int(theme == 'light')}")
    assert (narrow["scroll"], wide["scroll"]) == (400, 1600)
    colour = getattr(figures, theme.upper()).background
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    for found in (narrow, wide):
        assert found["back"] == f"rgb({red}, {green}, {blue})"
        assert len(found["plots"]) == 5
        assert all(right <= found["scroll"] for right in found["wide"])
        for plot in found["plots"]:
            assert plot["shown"] == 1
            assert 330 <= plot["width"] <= 600
            assert plot["left"] >= 0
            assert plot["right"] <= found["scroll"]
            assert plot["texts"]
            for text in plot["texts"]:
                assert text["size"] >= 10.5  # pixels
                assert min(text["left"], text["right"], text["top"], text["bottom"]) >= -1  # not cut off
    assert wide["plots"][0]["width"] == 600


@pytest.mark.slow
def test_a_browser_shows_every_edge(browse, edges, tmp_path):
    for i, found in enumerate(measure(browse, edges.values(), tmp_path)):
        assert found["scroll"] == (400, 1600)[i % 2]
        for plot in found["plots"]:
            assert plot["shown"] == 1
            for text in plot["texts"]:
                assert min(text["left"], text["right"], text["top"], text["bottom"]) >= -1


def test_a_browser_runs_no_script_and_says_nothing(browse, page, tmp_path):
    assert browse(page)[1] == []
    other = tmp_path / "other.html"
    other.write_text(page.read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    document, logged = browse(other)
    assert "Content Security Policy" in "".join(logged)  # so that silence above means something
    assert "<title>A report</title>" in document
