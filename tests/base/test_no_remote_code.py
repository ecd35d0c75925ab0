"""Code in a model folder never runs, whatever stands on stdin."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from qrosa.base.load import load_base
from qrosa.errors import InputError

_CODE = "from pathlib import Path\nPath({ran!r}).write_text('ran')\n"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["a known model", "an unknown model"])
def test_code_beside_a_model_is_not_run(tiny_model_dir, tmp_path, monkeypatch, where, known):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model_dir(), folder)
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(_CODE.format(ran=str(ran)))
    settings = json.loads((folder / where).read_text())
    settings["auto_map"] = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    if not known:
        settings |= {"model_type": "evil"} if where == "config.json" else {"tokenizer_class": "EvilTokenizer"}
    (folder / where).write_text(json.dumps(settings))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    try:
        load_base(str(folder))
    except InputError:
        pass
    assert not ran.exists()
