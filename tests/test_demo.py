"""The demo, small: every rung is there and the ladder goes up."""
import json

from llmcourse import demo


def test_demo_climbs(tmp_path, capsys):
    ladder = demo.run(tmp_path / "demo", seed=11, n=20, steps=6)
    assert [r["n"] for r in ladder] == [100] * 4
    base, sft, grpo, served = (r["accuracy"] for r in ladder)
    assert base == 0 and sft > .5 and grpo > sft - .05 and served > sft - .1
    assert abs(served - grpo) <= .06, "the GGUF answers unlike the model that it was made from"
    rows = [json.loads(x) for x in (tmp_path / "demo/ladder.jsonl").read_text().splitlines()]
    assert rows == ladder
    assert (tmp_path / "demo/ladder.png").stat().st_size > 5000
    for part in ("sft/run.yaml", "grpo/run.yaml", "gguf/Modelfile"):
        assert (tmp_path / "demo" / part).is_file()
    said = capsys.readouterr().out
    assert "95 % interval" in said and str(tmp_path / "demo") in said
