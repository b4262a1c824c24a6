"""Reading jobs: invalid lines are counted, and the first of them named."""

from rerankq.cli import submit


def test_job_reader_names_faults_up_to_a_limit_and_counts_all(tmp_path):
    (tmp_path / "jobs").write_text("nope\n" * submit.FAULTS_PRINTED + '{"query": "a", "chunks": ["b", "c"]}\n')
    printed = []
    reader = submit.JobReader(str(tmp_path / "jobs"), printed.append)
    assert (reader.check(), reader.check()) == (2, 2)
    assert len(printed) == submit.FAULTS_PRINTED + 1, "the second reading's are counted on"
    assert printed[submit.FAULTS_PRINTED - 1].startswith(f"{tmp_path}/jobs:{submit.FAULTS_PRINTED}: ")
    assert printed[-1] == f"{tmp_path}/jobs: more invalid lines"
