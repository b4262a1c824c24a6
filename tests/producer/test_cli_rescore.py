"""A re-scoring in this process: header, jobs, measures and report, over a client whose rankings are known."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from rerankq import JobFailed, RankedChunk, Ranking, catalogue
from rerankq.contract import ModelName, Usage
from rerankq.rescoring import rescore
from rerankq.rescoring.collection import Collection
from rerankq.rescoring.inputs import InputFault
from rerankq.rescoring.journal import Answer, Journal
from rerankq.rescoring.rescore import Plan
from rerankq.settings import Settings
from rerankq.stream import OpenClient

FUSION = "[profile.default]\nweights = {{ model = {}, vector = 0.4 }}\n"


class Progress:
    """Keeps what a person would see."""

    def __init__(self):
        self.printed, self.total, self.done = [], None, 0

    def describe(self, step):
        pass

    def notify(self, message):
        self.printed.append(message)

    def start(self, pairs, done=0):
        self.total, self.done = pairs, done

    def advance(self, pairs):
        self.done += pairs


class JobClient:
    """A client that turns every first stage round; of jobs whose query is in *failing* it says that they failed."""

    def __init__(self, failing=()):
        self.failing = failing
        self.jobs = {}

    def submit_many(self, jobs):
        accepted = {job.id: job for job in jobs}
        self.jobs |= accepted
        return list(accepted)

    def as_completed(self, job_ids, timeout=None):
        for name in job_ids:
            job = self.jobs[name]
            yield name, JobFailed("failed") if job.query in self.failing else turned_round(job)

    def cancel(self, job_id):
        raise AssertionError("nothing is left to cancel")

    def forget(self, *job_ids):
        pass


def turned_round(job):
    chunks = [
        RankedChunk(
            id=chunk.id, index=at, rank=len(job.chunks) - at, score=at / 10, model_logit=-at, missing=["vector"]
        )
        for at, chunk in enumerate(job.chunks)
    ]
    usage = Usage(pairs=len(chunks), cached_pairs=1, truncated_pairs=2)
    return Ranking(job_id=job.id, model=ModelName(name="m", fingerprint="w"), chunks=chunks[::-1], usage=usage)


@pytest.fixture
def plan(tmp_path):
    """Three queries with three documents each; of all but the last there are judgements."""
    queries, documents = ("q1", "q2", "q3"), ("d1", "d2", "d3")
    run = [f"{query} Q0 {name} 0 {3 - at} x" for query in queries for at, name in enumerate(documents)]
    write(tmp_path / "q", (json.dumps({"_id": query, "text": f"text of {query}"}) for query in queries))
    write(tmp_path / "c", (json.dumps({"_id": name, "text": name}) for name in documents))
    write(tmp_path / "r", run)
    write(tmp_path / "j", ["q1 d1 1", "q2 d3 1"])
    return Plan(*(str(tmp_path / name) for name in ("q", "c", "r", "out")), qrels=str(tmp_path / "j"))


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def settings(tmp_path):
    for number in (1, 2):
        (tmp_path / f"conf{number}").mkdir()
        (tmp_path / f"conf{number}" / "fusion.toml").write_text(FUSION.format(number))
    return Settings(_env_file=None, broker_url="redis://nobody/0", model="m", conf_dir=tmp_path / "conf1")


@pytest.fixture
def do(plan, settings):
    """Re-score over a client of its own."""

    def do(client=None, progress=None, **options):
        opened = nullcontext(OpenClient(client or JobClient()))
        given = replace(plan, **options)
        return rescore.rescore(given, rescore.check(given, settings), settings, progress or Progress(), lambda: opened)

    return do


def collection_of(plan):
    return Collection.read(
        queries=plan.queries, corpus=plan.corpus, run=plan.run, qrels=plan.qrels, depth=plan.depth, limit=plan.limit
    )


def answer(query, rows, **fields):
    return Answer(query, rows, "m", "w", **fields)


def test_journal_of_a_profile_with_other_numbers_is_not_resumed(plan, settings, tmp_path):
    with Journal.open(tmp_path / "out.part", rescore.header(plan, settings)) as journal:
        journal.append(answer("q1", [("d1", 0.5, 1.0)]))
    other = settings.model_copy(update={"conf_dir": tmp_path / "conf2"})
    with pytest.raises(InputFault, match=r"started with another fusion .*'model': 1.* before, .*'model': 2.* now"):
        Journal.open(tmp_path / "out.part", rescore.header(plan, other))


@pytest.mark.parametrize("changed", ["q", "c", "r"])
def test_header_changes_with_the_bytes_of_each_input(plan, settings, tmp_path, changed):
    before = rescore.header(plan, settings)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    assert rescore.header(plan, settings) != before


@pytest.mark.parametrize("option", [{"depth": 2}, {"limit": 2}, {"model": "n"}])
def test_header_changes_with_each_option_that_changes_the_output(plan, settings, option):
    assert rescore.header(replace(plan, **option), settings) != rescore.header(plan, settings)


@pytest.mark.parametrize("option", [{"qrels": None}, {"output": "x"}, {"restart": True}, {"force": True}])
def test_header_ignores_options_that_do_not_change_scores(plan, settings, option):
    assert rescore.header(replace(plan, **option), settings) == rescore.header(plan, settings)


def test_header_has_the_model_of_the_settings_if_none_is_named(plan, settings):
    other = settings.model_copy(update={"model": "n"})
    assert rescore.header(plan, other) != rescore.header(plan, settings)
    assert rescore.header(replace(plan, model="x"), other) == rescore.header(replace(plan, model="x"), settings)


def test_metrics_are_means_over_queries_that_are_judged_and_ranked(plan, tmp_path):
    with collection_of(plan) as collection, Journal.open(tmp_path / "part", {}) as journal:
        # The model has d3 first, the fusion d2, by the order of the ranking; q3 has no judgements.
        for query in ("q1", "q3"):
            journal.append(answer(query, [("d2", 0.3, -2.0), ("d3", 0.3, 0.0), ("d1", 0.3, -3.0)]))
        found, queries = rescore.measure(collection, journal, fusion="default")
        assert queries == 1, "q2 failed"
        assert found == {"first stage": 1.0, "model alone": 0.5, "fusion default": 0.5}
        journal.append(answer("q2", [("d2", 0.3, -2.0), ("d3", 0.3, 0.0), ("d1", 0.3, -3.0)]))
        found, queries = rescore.measure(collection, journal, fusion="default")
    assert queries == 2
    assert found == pytest.approx(
        {"first stage": 0.75, "model alone": 0.75, "fusion default": (0.5 + 0.63093) / 2}, abs=1e-5
    )


def test_metric_over_fewer_queries_than_the_others_is_none(plan, tmp_path):
    with collection_of(plan) as collection, Journal.open(tmp_path / "part", {}) as journal:
        journal.append(answer("q1", [("d1", 0.3, 1.0)]))
        journal.append(answer("q2", [("d3", 0.3, None)]))
        found, queries = rescore.measure(collection, journal, fusion="default")
    assert (found, queries) == ({"first stage": 0.75, "model alone": None, "fusion default": 1.0}, 2)


def test_weighted_signal_that_no_chunk_has_is_missing():
    chunks = [
        RankedChunk(id="a", index=0, rank=1, score=1, missing=["vector", "keyword", "token"]),
        RankedChunk(id="b", index=1, rank=2, score=0, missing=["vector", "token"]),
    ]
    ranking = Ranking(job_id="x", model=ModelName(name="m", fingerprint="w"), chunks=chunks)
    weights = {"model": 1, "vector": 0.5, "keyword": 0.5, "token": 0}
    assert rescore.signals_nowhere(ranking, weights) == ("vector",)
    assert rescore.signals_nowhere(ranking.model_copy(update={"chunks": []}), weights) == ()


def test_run_is_rescored_and_reported(do, plan, tmp_path):
    client, progress = JobClient(), Progress()
    report = do(client, progress)
    assert (tmp_path / "out").read_text().splitlines()[:3] == [
        "q1 Q0 d3 1 0.2 rerankq",
        "q1 Q0 d2 2 0.1 rerankq",
        "q1 Q0 d1 3 0.0 rerankq",
    ]
    assert (report.queries, report.resumed, report.judged_queries) == (3, 0, 2)
    assert (report.pairs, report.cached_pairs, report.truncated_pairs) == (9, 3, 6)
    assert (report.model, report.weights, report.fusion, report.failed) == ("m", "w", "default", {})
    assert report.missing == {"vector": 3}, "by the weights of the folder of one's own"
    assert replace(report, seconds=2.0).pairs_per_s == 4.5
    assert replace(report, seconds=0.0).pairs_per_s == 0
    assert (progress.total, progress.done, progress.printed) == (9, 9, [])
    assert not (tmp_path / "out.part").exists()
    assert {job.priority for job in client.jobs.values()} == {"bulk"}, "a person's questions go first"
    assert [job.query for job in client.jobs.values()] == ["text of q1", "text of q2", "text of q3"]
    assert {chunk.id: chunk.keyword_score for chunk in next(iter(client.jobs.values())).chunks} == {
        "d1": 3,
        "d2": 2,
        "d3": 1,
    }


def test_failed_queries_alone_are_tried_again_by_the_same_command(do, tmp_path):
    report = do(JobClient(failing={"text of q2"}))
    assert (report.failed, report.queries, report.judged_queries) == ({"q2": "JobFailed: failed"}, 3, 1)
    assert {line.split()[0] for line in (tmp_path / "out").read_text().splitlines()} == {"q1", "q3"}
    assert (tmp_path / "out.part").exists()
    client, progress = JobClient(), Progress()
    report = do(client, progress)
    assert [job.query for job in client.jobs.values()] == ["text of q2"]
    assert (report.queries, report.resumed, report.pairs, progress.total, progress.done) == (3, 2, 3, 9, 9)
    assert not (tmp_path / "out.part").exists()


def test_existing_output_is_refused_unless_its_own_journal_is_resumed(do, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputFault, match="out exists; add --force"):
        do()
    do(JobClient(failing={"text of q2"}), force=True)
    with pytest.raises(InputFault, match="out exists; add --force"):
        do(restart=True)
    with pytest.raises(InputFault, match="out exists; add --force"):
        do(depth=2)
    assert do().resumed == 2, "what is done goes on"


def test_interrupted_rescore_says_where_its_progress_is_kept(do, tmp_path):
    class Stopped(JobClient):
        done = 0

        def as_completed(self, job_ids, timeout=None):
            yield from list(super().as_completed(job_ids))[: self.done]
            raise KeyboardInterrupt

        def cancel(self, job_id):
            return "cancelled"

    progress, client = Progress(), Stopped()
    with pytest.raises(KeyboardInterrupt):
        do(client, progress)
    assert progress.printed == []
    client.done = 1
    with pytest.raises(KeyboardInterrupt):
        do(client, progress)
    assert progress.printed == [f"stopped; the progress is kept in {tmp_path}/out.part, and the same command resumes"]


def test_skipped_lines_and_useless_judgements_are_reported(do, plan, tmp_path):
    with (tmp_path / "c").open("a") as file:
        file.write("nope\n")
    write(tmp_path / "j", ["other d1 1"])
    progress = Progress()
    report = do(progress=progress)
    assert report.skipped_lines == {plan.corpus: 1}
    assert progress.printed == [
        f"{plan.corpus}: 1 invalid line skipped, the first: {plan.corpus}:4: not JSON: Expecting value at column 1",
        f"{plan.qrels}: has no judgement for any query of the run",
    ]
    assert report.ndcg == {"first stage": None, "model alone": None, "fusion default": None}
    assert do(qrels=None, force=True).ndcg == {}


def test_catalogue_of_the_configured_folder_is_used(do, settings, plan):
    assert catalogue.resolve("default", settings.conf_dir).weights == {"model": 1, "vector": 0.4}
    with pytest.raises(InputFault, match=r"--fusion: no profile 'elasticsearch'; there are default$"):
        do(fusion="elasticsearch")


def test_depth_is_limited_by_the_size_of_a_job(plan, settings):
    most = settings.max_chunks
    rescore.check(replace(plan, depth=most), settings)
    with pytest.raises(InputFault, match=f"--depth: expected 1 to {most}"):
        rescore.check(replace(plan, depth=most + 1), settings)
