"""The page of the claims, from rows that are made up."""

import html
import json
import random
import re
from pathlib import Path

import pytest
from claim_rows import made_up_rows
from test_comparison_page import browse, measure  # noqa: F401

from experiment.claims import page
from experiment.claims.findings import find
from experiment.claims.registry import BY_NAME, CLAIMS

ROOT = Path(__file__).parents[1]
NAMES = ("sigmoid_and_tanh", "noise_regularizes")  # a figure of points, and one of lines


def rows_of(*names):
    """Equal runs of two claims are one row, so the numbers come from what is run, not from the order."""

    def number(*what):
        return random.Random(str(what)).random()

    return {cell: row for name in names for cell, row in made_up_rows(BY_NAME[name], number).items()}


def command(claim):
    return f"python launch/claims.py <x> claims=[{claim}]"


def write(rows, folder, claims=NAMES):
    return page.write_report([BY_NAME[name] for name in claims], None, rows, folder, command)


def test_the_page_says_what_it_must(tmp_path):
    rows = rows_of(*NAMES)
    failed = next(cell for cell, row in rows.items() if row["phase"] == "report")
    rows[failed] = {**rows[failed], "status": "failed", "reason": "ValueError: <b>", "numbers": {}}
    [first, second] = write(rows, tmp_path)
    page_text = (tmp_path / "index.html").read_text()
    text = html.unescape(page_text)
    for outcome in (first, second):
        claim = outcome.claim
        assert text.index(claim.sentence) < text.index(f'id="{claim.name}"')  # in the table at the top, too
        assert text.count(claim.literature) == 2
        for finding in outcome.findings:
            # The rule stands before the numbers.
            assert text.index(str(finding.part.rule)) < text.index(f"{finding.limits}</td>")
            assert finding.estimate in text
        assert f"claims=[{claim.name}]" in text
        assert f"corrected by Holm for all {2 + 4} parts" in text
        for finding in outcome.findings:
            row = text[text.index(f'<tr><th scope="row">{finding.part.label}</th>') :].partition("</tr>")[0]
            n, left_out = finding.interval.n, finding.num_left_out
            note = f" ({left_out} without a number)" if left_out else ""
            needed = finding.seeds_needed
            note = f" (about {needed} would decide)" if needed and not left_out else note
            assert f'data-name="n">{n}{note}</td>' in row
            assert re.search(r'data-name="p, corrected">(< )?[01]\.\d{3}</td>', row)
        for choice in outcome.choices:
            assert f'<td class="number">{choice.rate:g}</td>' in text
    assert "ValueError: &lt;b&gt;" in page_text
    assert "1 run failed" in text
    assert "launch/claims.py &lt;x&gt;" in page_text
    assert "inference BatchNorm is one multiply-add" in text
    assert "Content-Security-Policy" in text
    assert not re.findall(r"<script|https?://(?!www\.w3\.org)", text)
    assert len(re.findall("<svg", text)) == 2 * 2
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"{n}_1.{e}" for n in NAMES for e in ("svg", "png")
    }


def test_equal_rows_give_equal_files_and_missing_runs_are_told(tmp_path):
    rows = rows_of("noise_regularizes")
    turned = dict(reversed(rows.items()))
    for folder, given in (("a", rows), ("b", turned)):
        write(given, tmp_path / folder, ["noise_regularizes"])
    assert (tmp_path / "a" / "index.html").read_bytes() == (tmp_path / "b" / "index.html").read_bytes()
    assert "runs are missing" not in (tmp_path / "a" / "index.html").read_text()
    del rows[next(cell for cell, row in rows.items() if row["phase"] == "report")]
    write(rows, tmp_path / "a", ["noise_regularizes"])
    assert "runs are missing" in (tmp_path / "a" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_all_claims_on_a_phone_and_on_a_screen(browse, tmp_path, theme):  # noqa: F811
    names = [claim.name for claim in CLAIMS]
    write(rows_of(*names), tmp_path, names)
    flags = f"--blink-settings=preferredColorScheme={int(theme == 'light')}"
    narrow, wide = measure(browse, [tmp_path / "index.html"], tmp_path, flags)
    assert (narrow["scroll"], wide["scroll"]) == (400, 1600)
    for found in (narrow, wide):
        assert len(found["plots"]) == sum(len(claim.plots) for claim in CLAIMS)
        for plot in found["plots"]:
            assert plot["shown"] == 1
            assert plot["right"] <= found["scroll"]
            for text in plot["texts"]:
                assert text["size"] >= 10
                assert min(text["left"], text["right"], text["top"], text["bottom"]) >= -1  # not cut off


@pytest.mark.slow
def test_with_no_run_at_all_there_is_a_page(tmp_path):
    outcomes = write({}, tmp_path, [claim.name for claim in CLAIMS])
    assert {outcome.verdict for outcome in outcomes} == {"open"}


def test_the_documented_verdicts_are_those_of_the_stored_results():
    lines = (ROOT / "docs" / "results" / "claims" / "results.jsonl").read_text().splitlines()
    rows = {row["cell"]: row for row in map(json.loads, lines) if "cell" in row}
    guide = (ROOT / "docs" / "claims.md").read_text()
    stored = (ROOT / "docs" / "results" / "claims" / "index.html").read_text()
    for claim in CLAIMS:
        outcome = find(claim, claim.seeds, rows)
        assert outcome.is_complete
        assert outcome.failed == []
        assert f"| {claim.sentence} | {outcome.verdict} | {outcome.line} |" in guide
        assert f"<td>{outcome.line}</td>" in html.unescape(stored)
