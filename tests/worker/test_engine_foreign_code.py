"""A model is data: code that lies beside its weights is never run."""

import json
from pathlib import Path

import pytest

from rerankq_worker.engine import EngineError, load

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "minilm-l6-rerank"


@pytest.mark.parametrize("known", [True, False], ids=["of a known architecture", "of its own"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path, known):
    folder, ran = tmp_path / "model", tmp_path / "it-ran"
    folder.mkdir()
    for file in BUNDLED.iterdir():
        (folder / file.name).symlink_to(file)
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Model: ...\nclass Config: ...\n"
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((BUNDLED / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_own.Config",
        "AutoModelForSequenceClassification": "modeling_own.Model",
    }
    if not known:
        config["model_type"] = "own"
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    if known:
        assert load(str(folder), "cpu", "float32", runtime="torch").score([("why tides?", "the moon")]).shape == (1,)
    else:
        with pytest.raises(EngineError):
            load(str(folder), "cpu", "float32")
    assert not ran.exists()
