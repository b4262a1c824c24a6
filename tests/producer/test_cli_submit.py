"""Reading jobs: invalid lines are counted, and the first of them named."""

from rerankq.cli import submit


def test_job_reader_names_faults_up_to_a_limit_and_counts_all(tmp_path):
    (tmp_path / "jobs").write_text("nope\n" * submit.FAULTS_PRINTED + '{"query": "a", "chunks": ["b", "c"]}\n')
    told = []
    reader = submit.JobReader(str(tmp_path / "jobs"), told.append)
    assert (reader.check(), reader.check()) == (2, 2)
    assert len(told) == submit.FAULTS_PRINTED + 1, "the second reading's are counted on"
    assert told[submit.FAULTS_PRINTED - 1].startswith(f"{tmp_path}/jobs:{submit.FAULTS_PRINTED}: ")
    assert told[-1] == f"{tmp_path}/jobs: more invalid lines"
