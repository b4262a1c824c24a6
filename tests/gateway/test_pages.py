"""The pages over HTTP: what browsers may do with them, and that they are made of nothing from elsewhere."""

import re

import httpx
import pytest

from rerankq.gateway import pages
from rerankq.gateway.pages import FOLDER, PAGES

FILES = sorted(name for name in pages.documents() if name != "sample.json")


@pytest.fixture
def quiet(start_gateway):
    """A gateway without workers, which pages do not need."""
    with httpx.Client(base_url=start_gateway().url) as client:
        yield client


def test_pages_come_with_a_policy_that_lets_nothing_in_from_elsewhere(quiet):
    for path in (*PAGES, *(f"/{FOLDER}/{name}" for name in FILES)):
        answer = quiet.get(path)
        assert answer.status_code == 200, path
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_files_have_the_types_that_browsers_insist_on(quiet):
    types = {"index.html": "text/html", "playground.js": "text/javascript", "style.css": "text/css"}
    for name, kind in types.items():
        assert quiet.get(f"/{FOLDER}/{name}").headers["content-type"] == f"{kind}; charset=utf-8"
    assert quiet.get(f"/{FOLDER}/icon.svg").headers["content-type"] == "image/svg+xml"


@pytest.mark.parametrize("path", ["/", "/deployment", f"/{FOLDER}/playground.js"])
def test_what_a_browser_has_already_is_not_sent_again(quiet, path):
    first = quiet.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = quiet.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert quiet.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    assert quiet.head(path).content == b""


@pytest.mark.parametrize("name", ["", "none.js", "..%2fpages.py", "%2e%2e/pages.py", "index.html%00"])
def test_nothing_but_the_files_of_the_pages_is_served(quiet, name):
    assert quiet.get(f"/{FOLDER}/{name}", follow_redirects=True).status_code == 404


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_has_inline_code(name):
    text = pages.documents()[name].body.decode()
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}", text))
    assert addresses <= {"http://www.w3.org"}, "the names of SVG are not fetched"
    if name.endswith(".html"):
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
        assert set(re.findall(r'(?:src|href)="(?!/|#)([^"]*)"', text)) == set()
    if name.endswith(".js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)


def test_the_sample_is_made_of_jobs_that_the_gateway_takes(quiet):
    jobs = quiet.get(f"/{FOLDER}/sample.json").json()
    assert len(jobs) == 6
    for job in jobs:
        scores = [chunk["keyword_score"] for chunk in job["chunks"]]
        assert scores == sorted(scores, reverse=True)
        assert quiet.post("/v1/jobs", json=job).status_code == 202
