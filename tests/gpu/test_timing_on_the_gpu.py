"""`refpeft compare --bench` on a GPU: whether steps are captured, and why not."""

import json

from click.testing import CliRunner
from test_timing import CONFIG

from refpeft import timing
from refpeft.cli import main


def test_it_is_told_which_steps_are_a_graph_and_why_others_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    asked = ["--bench", "--methods", "lora,adamix", "--model", "tiny.json", "--device", "cuda", "--dtype", "bfloat16"]
    result = CliRunner().invoke(
        main, ["compare", *asked, "--batch", "2", "--length", "8", "--steps", "2", "--out", "o"]
    )
    assert result.exit_code == 0, result.output
    lora, adamix, again = json.loads((tmp_path / "o" / timing.JSON).read_text())["rows"]
    assert lora["captured"] and again["captured"] and not lora["refused"]
    assert not adamix["captured"] and "on the host" in adamix["refused"]
    assert "no: adamix draws a number on the host" in result.stdout
    assert all(row["peak_bytes"] > 0 for row in (lora, adamix, again))
    assert again["peak_bytes"] < 2 * lora["peak_bytes"]  # what was held before is not counted again
