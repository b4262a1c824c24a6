"""The pages in headless Chromium, in front of a real worker: driven as a person would, with the keyboard too.

Whatever a browser complains about (errors of scripts, of the content security policy, files that are missing) fails
the test that was running.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from test_deployment_routes import SECRET, kill
from test_keys import SECRETS, keys_file

from rerankq import Client
from rerankq.rescoring.inputs import judgements

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# The headless one first: it draws pages alone, no windows around them, for half the time.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
# Milliseconds that a step may take: a worker of one test process among several loads its model in that time.
STEP_MS = 60_000
SIZES = {"phone": (360, 740), "desktop": (1280, 900)}
# What the axe of WCAG 2.2 AA finds, and what is good practice.
AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
# Nothing is written of what passes, which is nearly everything.
AXE_OPTIONS = {"runOnly": {"type": "tag", "values": AXE_RULES}, "resultTypes": ["violations"]}
TIDES = [
    "Bread rises because yeast makes gas.",
    "Tides rise and fall because the moon's gravity pulls the sea.",
    "The stock market fell on Monday.",
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no Chromium here", pytrace=False)
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # A process for all pages of a context: each page of its own would take half a second to compile the same.
        args = ["--no-sandbox", "--disable-gpu", "--process-per-site"]
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield running
        running.close()


@pytest.fixture(scope="module")
def context(browser, url) -> Callable:
    """Give the context with these options: what a page keeps, it keeps in its tab."""
    made: dict[str, object] = {}

    def with_options(**options):
        name = json.dumps(options)
        if name not in made:
            made[name] = browser.new_context(accept_downloads=True, **options)
            # Its process lives as long as it has a page.
            made[name].new_page().goto(f"{url}/icon")
        return made[name]

    return with_options


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    found: list[str] = []
    yield found
    assert found == []


@pytest.fixture
def visit(context, complaints, url, start_gateway) -> Iterator[Callable]:
    """Open a page of the gateway that has a worker, or of another one; closed before gateways are."""
    pages = []

    def go(path: str = "/", *, base: str = "", size: str = "desktop", expected: str = "", **options):
        width, height = SIZES[size]
        page = context(viewport={"width": width, "height": height}, **options).new_page()
        pages.append(page)
        page.set_default_timeout(STEP_MS)

        def complain(text: str) -> None:
            if not (expected and re.search(expected, text)):
                complaints.append(text)

        page.on("pageerror", lambda error: complain(f"error: {error}"))
        page.on(
            "console",
            lambda message: complain(f"console: {message.text}") if message.type in {"error", "warning"} else None,
        )
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) => "
            "console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )
        page.goto((base or url) + path)
        return page

    yield go
    for page in pages:
        page.close()


@pytest.fixture
def page(visit):
    """The playground, ready."""
    opened = visit()
    ready(opened)
    return opened


def until(page, expression: str, arg: object = None) -> None:
    """Wait until an expression is true, or a function of *arg* answers so: the page looks, and tells us once."""
    asked = f"typeof ({expression}) === 'function' ? ({expression})(arg) : ({expression})"
    came = page.evaluate(
        f"arg => new Promise((tell) => {{ const ends = performance.now() + {STEP_MS}; const look = () => "
        f"{{ if ({asked}) tell(true); else if (performance.now() > ends) tell(false); else setTimeout(look, 20); }}; "
        "look(); })",
        arg,
    )
    assert came, expression


def ready(page) -> None:
    until(page, "document.querySelectorAll('#profile option').length > 3")
    until(page, "document.querySelectorAll('#sample option').length === 7")
    until(page, "document.querySelectorAll('#compare option').length > 3")


def settle(page, work: Callable[[], object]) -> None:
    """Do something that ranks again, and wait until the new ranking is shown."""
    page.evaluate(
        "() => { window.seen = false; "
        "new MutationObserver(() => { window.seen = true; })"
        ".observe(document.querySelector('#rankings'), { childList: true }); }"
    )
    work()
    until(page, "window.seen && document.querySelector('#results').getAttribute('aria-busy') !== 'true'")


def rank(page, chunks: str | list, query: str = "why do tides rise and fall?") -> None:
    text = chunks if isinstance(chunks, str) else "\n".join(map(json.dumps, chunks))
    page.fill("#query", query)
    page.fill("#chunks", text)
    settle(page, lambda: page.press("#chunks", "Control+Enter"))


def order(page, column: str = ".column:last-child > .rows") -> list[int]:
    rows = f"#rankings {column} > .row"
    return page.eval_on_selector_all(rows, "rows => rows.map((row) => Number(row.dataset.index))")


def scores(page) -> list[float]:
    return [float(one) for one in page.locator("#rankings .column:last-child > .rows .score").all_text_contents()]


# -- what goes in and what comes out --------------------------------------------------------------------------------


def test_the_sample_is_ranked_with_bars_moves_and_lines(page):
    settle(page, lambda: page.click("#try"))
    rows = page.locator("#rankings .row")
    assert rows.count() == 36
    assert "capybaras" in rows.first.locator(".text").inner_text()
    assert rows.first.locator(".bar .of-model").count() == rows.first.locator(".bar .of-token").count() == 1
    assert "up 2 from 3 in the first stage" in rows.first.locator(".place").inner_text()
    until(page, "document.querySelectorAll('.gutter path').length === 36")
    assert page.locator(".gutter path.up").count() > 5
    assert "36 chunks ranked" in page.inner_text("#facts")
    assert scores(page) == sorted(scores(page), reverse=True)


def test_bars_are_as_long_as_what_signals_add(page):
    rank(page, [{"text": text, "vector_score": 0.5} for text in TIDES])
    row = page.locator(".row").first
    said = dict(re.findall(r"(\w+) ([\d.]+)", row.locator(".bar").get_attribute("aria-label").split(": ")[1]))
    widths = {
        name: row.locator(f".bar .of-{name}").evaluate("one => one.getBoundingClientRect().width")
        for name in ("model", "token")
    }
    assert widths["model"] / widths["token"] == pytest.approx(float(said["model"]) / float(said["token"]), rel=0.05)


def test_the_arithmetic_names_weights_values_and_what_they_add_up_to(page):
    rank(page, TIDES)
    why = page.locator(".row").first.locator(".why")
    why.click()
    assert why.get_attribute("aria-expanded") == "true"
    cells = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in page.locator(".row").first.locator(".arithmetic tbody tr").all()
    }
    assert cells["model"][0] == "0.7"
    assert cells["token"][0] == "0.3"
    parts = [float(adds) for *_, adds in cells.values()]
    factors = [float(weight) * float(value.removeprefix("× ")) for weight, value, _ in cells.values()]
    assert parts == pytest.approx(factors, abs=1e-3)
    score = page.locator(".row").first.locator(".arithmetic tfoot td").inner_text()
    assert float(score.removeprefix("= ")) == pytest.approx(sum(parts), abs=2e-3)


def test_a_missing_signals_weight_is_said_to_be_shared_out_or_dropped(page):
    chunks = [{"text": TIDES[0], "vector_score": 0.9}, {"text": TIDES[1]}]
    fusion = {"weights": {"model": 0.5, "vector": 0.5, "keyword": 0.2}}
    rank(page, json.dumps({"query": "why tides?", "chunks": chunks, "fusion": fusion}), query="why tides?")
    page.click("#explain-all")
    row = page.locator('.row[data-index="1"]')
    assert "vector: this chunk has no value; its weight 0.5 is shared out over model" in row.inner_text()
    assert "keyword: no chunk has a value, so its weight 0.2 is dropped" in row.inner_text()
    assert "0.5 → 1.000" in row.locator(".arithmetic").inner_text()


def test_reciprocal_ranks_show_the_ranks_that_they_came_from(page):
    page.select_option("#profile", "rrf")
    rank(page, TIDES)
    page.locator(".row").first.locator(".why").click()
    assert "÷ (60 + 1)" in page.locator(".row").first.locator(".arithmetic").inner_text()


PASTED = [
    ("one\r\n\r\n  two \n", "lines", 2),
    ('{"text": "one"}\n"two"\n{"_id": 7, "text": "three", "source": "s"}', "JSON lines", 3),
    ('["one", {"text": "two"}]', "a JSON array", 2),
    ('{"query": "q", "documents": ["one", "two"]}', "a rerank call", 2),
    ("{tides} in braces\nare lines", "lines", 2),
    ('"Quoted," she said.\nand on\nand on', "lines", 3),
    ("[1] a footnote\n[2] another", "lines", 2),
]


def test_what_is_pasted_is_read_as_what_it_is(page):
    read = "said => document.querySelector('#chunks-read').textContent === said"
    for text, kind, chunks in PASTED:
        page.fill("#chunks", text)
        until(page, read, arg=f"{chunks} chunks, read as {kind}")


def test_a_line_that_is_no_json_is_named(page):
    page.fill("#chunks", '{"text": "one"}\n{"text": }')
    page.wait_for_selector("#chunks-fault:not([hidden])")
    assert page.inner_text("#chunks-fault").startswith("line 2 is not JSON")
    page.fill("#chunks", '{"text": "one"}\n{"title": "two"}')
    until(page, "document.querySelector('#chunks-fault').textContent.includes('line 2: expected a field')")
    page.select_option("#format", "lines")
    assert page.inner_text("#chunks-read") == "2 chunks, read as lines"


def test_a_file_is_loaded_and_one_that_is_no_text_is_refused(page, tmp_path):
    good, bad = tmp_path / "chunks.jsonl", tmp_path / "chunks.bin"
    good.write_text("\ufeff" + "\n".join(json.dumps({"text": text}) for text in TIDES))
    bad.write_bytes(b"\xff\xfe\x00")
    page.set_input_files("#file", good)
    until(page, "document.querySelector('#chunks-read').textContent.startsWith('3 chunks')")
    page.set_input_files("#file", bad)
    until(page, "document.querySelector('#chunks-fault').textContent === 'chunks.bin is not UTF-8 text'")


def test_empty_input_is_asked_for_and_sends_nothing(page):
    sent = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.click("#rank")
    assert page.inner_text("#query-fault") == "Write a query first."
    assert "Paste chunks first" in page.inner_text("#chunks-fault")
    assert [page.get_attribute(field, "aria-invalid") for field in ("#query", "#chunks")] == ["true", "true"]
    page.fill("#query", "why?")
    assert page.get_attribute("#query", "aria-invalid") == "false"
    page.click("#rank")
    assert page.evaluate("document.activeElement.id") == "chunks"
    assert sent == []


def test_a_pasted_job_with_fields_that_no_control_can_show_is_refused_by_name(page):
    for fields, said in [
        ({"fusion": {"weights": {"model": "x"}}}, "fusion.weights: expected numbers by name, none below 0"),
        ({"fusion": {"boosts": [1, None]}}, "fusion.boosts: expected numbers by name, none below 0"),
        (
            {"fusion": {"weights": {"colour": 1}}},
            "fusion.weights: expected only model, token, vector, keyword, pagerank, tags, not colour",
        ),
        ({"fusion": {"method": "best"}}, 'fusion.method: expected "weighted" or "rrf"'),
        ({"fusion": {"normalise": "raw"}}, "fusion.normalise: expected rules by name"),
        ({"fusion": 7}, "fusion: expected the name of a profile, or an object"),
        ({"fusion": "nowhere"}, 'fusion: there is no profile "nowhere" here'),
        ({"top_k": 1.5}, "top_k: expected a whole number above 0"),
        ({"min_score": "high"}, "min_score: expected a number"),
        ({"query": ["why?"]}, "query: expected a text"),
        ({"fusion": {"weights": None, "boosts": None, "rrf_k": None}, "top_k": None, "model": None}, ""),
    ]:
        page.fill("#chunks", json.dumps({"chunks": ["one", "two"], **fields}))
        until(page, "said => document.querySelector('#chunks-fault').textContent === said", arg=said)
    assert page.inner_text("#chunks-read") == "2 chunks, read as a job"


def test_texts_are_shown_as_texts_whatever_is_in_them(page):
    page.on("dialog", lambda dialog: pytest.fail("a chunk ran as a script"))
    chunks = [
        {"text": "<img src=x onerror=alert(1)><script>alert(2)</script>", "id": "<b>id</b>", "title": "<i>title</i>"},
        {"text": "المد والجزر", "metadata": {"a": "<b>"}},
        {"text": "🌊 tides 👩‍🚀 é"},
        {"text": "wordwithoutend" * 300},
        {"text": " "},
    ]
    rank(page, chunks, query='<b>why</b> & "tides"?')
    page.click("#explain-all")
    assert page.locator("#rankings img, #rankings script, #rankings i").count() == 0
    assert "<script>alert(2)</script>" in page.locator('.row[data-index="0"] .text').inner_text()
    assert page.locator('.row[data-index="0"] .name').inner_text() == "<b>id</b>"
    assert page.locator('.row[data-index="1"] .text').evaluate("one => getComputedStyle(one).direction") == "rtl"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# -- controls rank again --------------------------------------------------------------------------------------------


def test_sliders_rank_again_from_the_score_cache(page):
    settle(page, lambda: page.click("#try"))
    before, first = order(page), scores(page)[0]
    page.focus("#weight-model")
    settle(page, lambda: page.press("#weight-model", "Home"))
    assert page.input_value("#weight-model-number") == "0"
    assert order(page) != before
    assert scores(page)[0] != first
    assert "default, changed" in page.locator("#rankings ol").first.get_attribute("aria-label")
    settle(page, lambda: page.fill("#weight-model-number", "0.5"))
    facts = page.inner_text("#facts")
    assert "36 of 36 pairs from the score cache" in facts
    assert "tokens computed" not in facts
    settle(page, lambda: page.click("#reset"))
    assert order(page) == before


def test_field_boosts_rank_again(page):
    rank(page, [{"text": "x", "title": "tides rise"}, {"text": "tides rise and fall", "title": "y"}])
    page.click("#boosts-of summary")
    before = page.locator('.row[data-index="0"] .score').inner_text()
    settle(page, lambda: page.fill("#boost-title-number", "9"))
    assert page.locator('.row[data-index="0"] .score').inner_text() != before


def test_a_threshold_and_top_k_cut_and_show_what_fell(page):
    settle(page, lambda: page.click("#try"))
    settle(page, lambda: page.fill("#min-score-number", "0.3"))
    kept = len(order(page))
    assert 0 < kept < 36
    assert min(scores(page)) >= 0.3
    fallen = page.locator(".dropped")
    assert f"Below the threshold 0.3: {36 - kept} chunks" in fallen.inner_text()
    assert fallen.locator(".row").count() == 36 - kept
    settle(page, lambda: page.fill("#top-k-number", "2"))
    assert len(order(page)) == 2
    assert page.locator(".dropped h3").all_inner_texts() == [
        f"Beyond the first 2: {kept - 2} chunks",
        f"Below the threshold 0.3: {36 - kept} chunks",
    ]
    assert "2 of 36 chunks kept" in page.inner_text("#facts")
    settle(page, lambda: page.fill("#min-score-number", "5"))
    assert "No chunk reaches the threshold" in page.inner_text("#rankings")
    settle(page, lambda: page.fill("#min-score-number", ""))
    settle(page, lambda: page.press("#top-k", "End"))
    assert len(order(page)) == 36


def test_the_first_stage_is_the_order_given_or_that_of_a_score(page):
    rank(page, [{"text": text, "vector_score": score} for text, score in zip(TIDES, (0.1, 0.2, 0.9), strict=True)])
    assert "up 1 from 2" in page.locator(".row").first.inner_text()
    page.select_option("#first-stage", "vector_score")
    assert "up 1 from 2" in page.locator('.row[data-index="1"]').inner_text()
    assert "from 1 in the first stage" in page.locator('.row[data-index="2"]').inner_text()


def test_a_cut_chunk_is_marked_where_it_was_cut(page):
    long = "Tides rise. " * 2_000
    rank(page, [{"text": long, "title": "Long"}, {"text": "short"}])
    row = page.locator('.row[data-index="0"]')
    said = re.search(r"cut after ([\d,]+) of ([\d,]+) characters", row.inner_text())
    assert int(said[2].replace(",", "")) == len(f"Long {long}".strip())
    row.locator(".why").click()
    assert row.locator(".text mark").first.inner_text() == "cut here: the model read no further"
    read = row.locator(".text").evaluate("one => one.firstChild.textContent")
    assert len(read) == int(said[1].replace(",", ""))
    assert row.locator(".text .unread").inner_text().strip().startswith(("Tides", "rise", "."))
    assert page.locator('.row[data-index="1"] .chip.warn').count() == 0


def test_two_profiles_stand_side_by_side(page):
    settle(page, lambda: page.click("#try"))
    settle(page, lambda: page.select_option("#compare", "profile:rrf"))
    assert page.locator(".column h3").all_inner_texts() == ["Profile default", "Profile rrf"]
    left, right = order(page, ".column:first-child > .rows"), order(page)
    assert sorted(left) == sorted(right)
    assert left != right
    until(page, "document.querySelectorAll('.gutter path').length === 36")
    assert "in Profile default" in page.locator(".column:last-child .row").first.inner_text()
    settle(page, lambda: page.select_option("#compare", ""))
    assert page.locator(".column").count() == 1


def test_two_models_that_are_served_stand_side_by_side(visit, start_gateway, start_worker, wait_until):
    gateway = start_gateway(model="stub")
    for model in ("stub", "stub:2e-6"):
        start_worker(gateway.settings.model_copy(update={"model": model, "default_model": "stub"}))
    wait_until(lambda: len(httpx.get(f"{gateway.url}/v1/deployment").json()["workers"]) == 2)
    page = visit(base=gateway.url)
    ready(page)
    until(page, "document.querySelectorAll('#compare optgroup').length === 2")
    rank(page, TIDES)
    settle(page, lambda: page.select_option("#compare", "model:stub:2e-6"))
    assert page.locator(".column h3").all_inner_texts() == ["stub", "stub:2e-6"]
    assert "model stub:2e-6" in page.locator(".column:last-child .facts").inner_text()
    settle(page, lambda: page.select_option("#model", "stub:2e-6"))
    assert page.locator(".column h3").first.inner_text() == "stub:2e-6"


def test_a_thousand_chunks_are_ranked_and_shown_in_parts(page):
    # By tokens alone: no model has to read them.
    chunks = [{"text": f"Chunk {number} about tides."} for number in range(1_000)]
    rank(page, json.dumps({"query": "why tides?", "chunks": chunks, "fusion": {"weights": {"token": 1}}}))
    assert "1,000 chunks ranked" in page.inner_text("#facts")
    assert page.locator(".row").count() == 50
    page.focus(".more")
    page.keyboard.press("Enter")
    assert page.locator(".row").count() == 250
    assert page.evaluate("document.activeElement.closest('.row') === document.querySelectorAll('.row')[50]")


# -- judgements and code --------------------------------------------------------------------------------------------


def test_judgements_are_saved_as_the_command_line_reads_them(page, tmp_path):
    rank(page, [{"text": text, "id": f"c{at}"} for at, text in enumerate(TIDES)] + [{"text": "x", "id": "with blank"}])
    assert page.locator("#save-qrels").is_disabled()
    page.get_by_label("Relevant: c1", exact=True).press("Enter")
    page.get_by_label("Not relevant: c0", exact=True).click()
    page.get_by_label("Relevant: c2", exact=True).click()
    page.get_by_label("Relevant: c2", exact=True).click()  # taken back
    page.get_by_label("Relevant: with blank", exact=True).click()
    assert "1 judgement cannot be saved" in page.inner_text("#judged")
    settle(page, lambda: page.fill("#weight-token-number", "0.1"))
    assert page.get_by_label("Relevant: c1", exact=True).get_attribute("aria-pressed") == "true"
    saved = []
    page.on("download", lambda download: saved.append(download))  # noqa: PLW0108 - playwright takes no built-in method
    page.click("#save-qrels")
    ends = time.monotonic() + STEP_MS / 1000
    while len(saved) < 2 and time.monotonic() < ends:
        page.wait_for_timeout(20)
    assert len(saved) == 2
    for one in saved:
        one.save_as(tmp_path / one.suggested_filename)
    assert judgements(str(tmp_path / "qrels.tsv")) == {"q1": {"c1": 1, "c0": 0}}
    [query] = map(json.loads, (tmp_path / "queries.jsonl").read_text().splitlines())
    assert query == {"_id": "q1", "text": "why do tides rise and fall?"}
    with (tmp_path / "qrels.tsv").open(newline="") as file:
        assert next(csv.reader(file, delimiter="\t")) == ["query-id", "corpus-id", "score"]
    rank(page, [{"text": "another text that has the id by now", "id": "c1"}])
    assert page.get_by_label("Relevant: c1", exact=True).get_attribute("aria-pressed") == "false"


NASTY = ["it's \"quoted\" $HOME `id` \\ %s {} 'JSON'", "line\nbreak\ttab", "JSON", "é 你好 🌊 \u2028 \u00a0"]


def test_the_curl_and_the_python_do_the_same(page, tmp_path):
    rank(page, [{"text": text} for text in NASTY], query='what\'s $PWD & "why"?')
    shown = order(page)
    page.click("#open-code")
    command, program = page.text_content("#curl"), page.text_content("#python")
    for shell in ("sh", "bash"):
        done = subprocess.run([shell], input=command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert [chunk["index"] for chunk in answer["ranking"]["chunks"]] == shown
    (tmp_path / "same.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "same.py"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [int(line.split()[2]) for line in done.stdout.splitlines()] == shown
    scope: dict = {}
    exec(re.search(r"^JOB = .*?(?=^def )", program, re.DOTALL | re.MULTILINE)[0], scope)
    assert [chunk["text"] for chunk in scope["JOB"]["chunks"]] == NASTY


def test_code_is_copied_by_a_button_and_the_dialog_closes_with_escape(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ready(page)
    rank(page, TIDES)
    page.click("#open-code")
    page.click("[data-copies=python]")
    until(page, "document.querySelector('#copied').textContent === 'Copied: python.'")
    assert page.evaluate("navigator.clipboard.readText()") == page.text_content("#python")
    page.keyboard.press("Escape")
    assert not page.locator("#code-dialog").is_visible()


# -- what goes wrong ------------------------------------------------------------------------------------------------


def answered(page, path: str, status: int, body: dict, headers: dict | None = None) -> None:
    page.route(
        path,
        lambda route: route.fulfill(status=status, json=body, headers=headers or {}),
    )


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (429, "900 pairs are waiting", "Too much is waiting: 900 pairs are waiting. Try again in 7 s."),
        (503, "the queue cannot be reached", "Not available now: the queue cannot be reached. Try again in 7 s."),
        (413, "2 000 000 bytes", "Too large: 2 000 000 bytes. Send fewer or shorter chunks."),
    ],
)
def test_refusals_are_said_in_plain_words(visit, status, message, said):
    page = visit(expected="Failed to load resource")
    ready(page)
    answered(page, "**/v1/jobs", status, {"message": message}, {"Retry-After": "7"})
    page.fill("#query", "why?")
    page.fill("#chunks", "one")
    page.click("#rank")
    page.wait_for_selector("#notice .notice")
    assert page.inner_text("#notice") == said


def test_a_job_that_the_gateway_refuses_says_which_field(visit):
    page = visit(expected="Failed to load resource.*422")
    ready(page)
    page.fill("#query", "why?")
    page.fill("#chunks", '{"text": "one", "id": "a"}\n{"text": "two", "id": "a"}')
    page.click("#rank")
    page.wait_for_selector("#notice .notice")
    assert "chunks.1.id" in page.inner_text("#notice")
    page.fill("#chunks", "one")
    for name in ("model", "token", "pagerank", "tags"):
        page.fill(f"#weight-{name}-number", "0")
    page.click("#rank")
    until(page, "document.querySelector('#notice').textContent.includes('at least one weight')")


def test_a_page_that_could_not_begin_does_so_when_it_is_used(visit, url):
    page = visit("/icon", expected="Failed to load resource.*(404|503)")
    refusals = iter([503])

    def answer(route):
        if next(refusals, None):
            route.fulfill(status=503, json={"message": "the queue cannot be reached."}, headers={"Retry-After": "7"})
        else:
            route.continue_()

    page.route("**/v1/fusion-profiles", answer)
    page.goto(url)
    until(page, "document.querySelector('#notice').textContent !== ''")
    assert page.inner_text("#notice") == "Not available now: the queue cannot be reached. Try again in 7 s."
    page.fill("#weight-model-number", "3")
    rank(page, json.dumps({"query": "why do tides rise?", "chunks": TIDES, "fusion": "rrf"}))
    assert (order(page)[0], page.input_value("#profile"), page.inner_text("#notice")) == (1, "rrf", "")


def test_an_unreachable_gateway_is_said_and_the_page_goes_on_once_it_is_back(visit):
    page = visit(expected="ERR_INTERNET_DISCONNECTED")
    ready(page)
    page.fill("#query", "why do tides rise?")
    page.fill("#chunks", "\n".join(TIDES))
    page.context.set_offline(True)
    page.click("#rank")
    page.wait_for_selector("#notice .notice")
    assert "The gateway cannot be reached" in page.inner_text("#notice")
    page.context.set_offline(False)
    settle(page, lambda: page.click("#rank"))
    assert page.inner_text("#notice") == ""
    assert order(page)[0] == 1


def test_a_key_is_asked_for_sent_and_kept_in_the_tab_only(visit):
    page = visit(expected="Failed to load resource.*401")
    ready(page)
    sent = []

    def refuse(route):
        sent.append(route.request.headers.get("authorization"))
        if sent[-1] == "Bearer rk-secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"message": "no such key"})

    page.route("**/v1/**", refuse)
    page.fill("#query", "why do tides rise?")
    page.fill("#chunks", "\n".join(TIDES))
    page.click("#rank")
    page.wait_for_selector("#key-dialog[open]")
    assert "asks for an API key" in page.inner_text("#notice")
    assert not page.locator("#key-fault").is_visible()
    page.fill("#key", "rk-mistyped")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-fault:not([hidden])")
    assert page.inner_text("#key-fault") == "no such key"
    page.fill("#key", "rk-secret")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#open-key').textContent === 'API key: set'")
    until(page, "document.querySelector('#notice').textContent === ''")
    settle(page, lambda: page.click("#rank"))
    assert sent[-1] == "Bearer rk-secret"
    page.click("#open-code")
    assert "rk-secret" not in page.text_content("#code-dialog")
    assert "$RERANKQ_API_KEY" in page.text_content("#curl")
    assert "RERANKQ_API_KEY" in page.text_content("#python")
    page.keyboard.press("Escape")
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.click("#open-key")
    page.click("#forget-key")
    until(page, "sessionStorage.length === 0")


def test_with_a_key_that_is_no_operators_one_ranks_and_the_deployment_says_what_it_needs(
    visit, start_gateway, start_worker, tmp_path
):
    gateway = start_gateway(api_keys=str(keys_file(tmp_path, one={}, all={"tenant": "*", "operator": True})))
    start_worker(gateway.settings)
    page = visit(base=gateway.url, expected="Failed to load resource.*40[13]")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", SECRETS["one"])
    page.keyboard.press("Enter")
    ready(page)
    rank(page, TIDES)
    assert len(order(page)) == 3
    page.click("nav a[href='/deployment']")
    page.wait_for_selector("#notice .notice")
    assert "need the key of an operator" in page.inner_text("#notice")
    page.click("#open-key")
    page.fill("#key", SECRETS["all"])
    page.keyboard.press("Enter")
    page.wait_for_selector("#workers tbody tr")
    assert page.inner_text("#notice") == ""


def test_without_a_worker_the_job_waits_is_explained_and_is_cancelled(visit, start_gateway, wait_until):
    gateway = start_gateway()
    page = visit(base=gateway.url)
    ready(page)
    page.fill("#query", "why?")
    page.fill("#chunks", "one")
    with page.expect_response("**/v1/jobs") as response:
        page.click("#rank")
    job_id = response.value.json()["job_id"]
    page.wait_for_selector("#notice .notice")
    assert "No worker serves stub at the moment" in page.inner_text("#notice")
    page.click("#cancel")
    assert page.inner_text("#notice") == "Cancelled."
    with Client(gateway.settings) as client:
        wait_until(lambda: client.status(job_id).state == "cancelled")


# -- for everybody --------------------------------------------------------------------------------------------------


def faults(page) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    found = axe.run(page, options=AXE_OPTIONS).response["violations"]
    return [f"{one['id']}: {one['help']}: {[node['target'] for node in one['nodes']][:3]}" for one in found]


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_axe_finds_no_fault_in_the_playground(visit, size, scheme):
    # axe writes styles of its own, which the policy forbids the page.
    page = visit(size=size, color_scheme=scheme, bypass_csp=True)
    ready(page)
    assert faults(page) == []
    long = "Tides rise. " * 400
    rank(
        page, [*({"text": text, "vector_score": 0.3} for text in TIDES), {"text": long, "title": "Long"}, {"text": "x"}]
    )
    settle(page, lambda: page.fill("#min-score-number", "0.2"))
    page.click("#explain-all")
    page.locator(".yes").first.click()
    assert faults(page) == []
    settle(page, lambda: page.select_option("#compare", "profile:rrf"))
    if size == "desktop":
        assert faults(page) == []
    page.click("#open-code")
    assert faults(page) == []


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_axe_finds_no_fault_in_the_deployment(visit, start_gateway, size, scheme):
    gateway = start_gateway()
    kill(gateway.settings, "poison")
    page = visit("/deployment", base=gateway.url, size=size, color_scheme=scheme, bypass_csp=True)
    page.click("summary")
    page.click("[data-does=texts]")
    page.wait_for_selector(".corpse pre")
    assert faults(page) == []
    page.click("[data-does=drop]")
    assert faults(page) == []


def test_the_playground_is_used_by_keyboard_alone(page):
    press = page.keyboard.press
    page.evaluate("document.activeElement.blur()")
    press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the ranking"
    while page.evaluate("document.activeElement.id") != "query":
        press("Tab")
    page.keyboard.type("why do tides rise?")
    press("Tab")  # how to read the chunks
    press("Tab")
    assert page.evaluate("document.activeElement.id") == "chunks"
    page.keyboard.insert_text("\n".join(TIDES))
    settle(page, lambda: press("Control+Enter"))
    while page.evaluate("document.activeElement.id") != "weight-token":
        press("Tab")
    settle(page, lambda: press("ArrowRight"))
    assert page.input_value("#weight-token-number") == "0.31"
    while not page.evaluate("document.activeElement.classList.contains('why')"):
        press("Tab")
    press("Enter")
    assert page.locator(".arithmetic").count() == 1
    # The focus stays where it was when the ranking is shown again.
    press("Tab")
    press("Space")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


@pytest.mark.parametrize("path", ["/", "/deployment"])
def test_a_phone_shows_all_of_a_page_without_scrolling_sideways(visit, path):
    page = visit(path, size="phone")
    if path == "/":
        ready(page)
        settle(page, lambda: page.click("#try"))
        page.click("#explain-all")
        settle(page, lambda: page.select_option("#compare", "profile:rrf"))
    else:
        page.wait_for_selector(".tile")
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES["phone"][0]


def test_rows_do_not_glide_where_motion_is_reduced(visit):
    page = visit(reduced_motion="reduce")
    ready(page)
    page.evaluate("() => { Element.prototype.animate = () => { throw new Error('animated'); }; }")
    settle(page, lambda: page.click("#try"))
    settle(page, lambda: page.fill("#weight-model-number", "0"))


# -- the deployment -------------------------------------------------------------------------------------------------


def test_the_deployment_shows_its_workers_and_what_they_did(visit, deployment):
    with Client(deployment) as client:
        client.rerank("why tides?", TIDES, timeout=60)
    page = visit("/deployment")
    page.wait_for_selector("#workers tbody tr")
    assert "bundled" in page.inner_text("#workers")
    until(page, "[...document.querySelectorAll('.tile')].some((one) => /%/.test(one.textContent))")
    # What an earlier test asked for may still wait when the page first looks.
    until(page, "document.querySelector('#queues').textContent.includes('No job is waiting')")
    assert "There are none" in page.inner_text("#dead")


def test_waiting_jobs_are_shown_with_their_queue_and_that_nobody_works(visit, start_gateway):
    gateway = start_gateway()
    with Client(gateway.settings) as client:
        client.submit_many([{"query": "q", "chunks": ["a", "b"], "tenant": tenant} for tenant in ("x", "y")])
    page = visit("/deployment", base=gateway.url)
    page.wait_for_selector("#queues tbody tr")
    cells = page.locator("#queues tbody tr").first.locator("th, td").all_inner_texts()
    assert cells[:3] == ["rerankq.interactive", "2", "4"]
    assert cells[-1] == "none"
    assert "No worker is running" in page.inner_text("#workers")


def test_dead_jobs_are_shown_without_texts_until_asked_then_retried_and_dropped(visit, start_gateway):
    gateway = start_gateway()
    for name in ("one", "two"):
        kill(gateway.settings, name)
    page = visit("/deployment", base=gateway.url, expected="Failed to load resource.*503")
    page.wait_for_selector(".corpse")
    assert SECRET not in page.content()
    job = page.locator('[data-job="one"]')
    job.locator("summary").click()
    assert "lease-over" in job.inner_text()
    job.locator("[data-does=texts]").click()
    job.locator("pre").wait_for()
    assert SECRET in job.locator("pre").inner_text()
    answered(page, "**/v1/dead/one/retry", 503, {"message": "full"})
    job.locator("[data-does=retry]").click()
    job.locator(".fault:not(:empty)").wait_for()
    with page.expect_response("**/v1/dead?limit=100"):
        pass
    assert job.locator(".fault").inner_text() == "Not available now: full. Try again in a moment."
    page.unroute("**/v1/dead/one/retry")
    job.locator("[data-does=retry]").click()
    page.wait_for_selector('[data-job="one"]', state="detached")
    page.locator('[data-job="two"] [data-does=drop]').click()
    page.click("#drop-dialog [value=keep]")
    assert page.locator('[data-job="two"]').count() == 1
    page.locator('[data-job="two"] [data-does=drop]').click()
    page.click("#drop-dialog [value=drop]")
    until(page, "document.querySelector('#dead').textContent === 'There are none.'")
    with Client(gateway.settings) as client:
        assert client.status("one").state == "queued"
        assert client.status("two").state == "unknown"


# -- the pictures of the documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["playground.png", "playground-phone.png"])
def test_pictures_for_the_documents_are_small(name):
    picture = Path(__file__).resolve().parents[2] / "docs" / name
    assert picture.stat().st_size < 200_000
