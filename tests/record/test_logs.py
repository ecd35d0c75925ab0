"""The logs of a run: put back to a checkpoint, at the cost of their lines and of nothing else."""

import pytest

from qrosa.record.logs import append_line, log_sizes, read_lines, restore

LINES = b'{"step": 1}\n{"step": 2}\n'


def test_a_log_is_cut_back_and_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(LINES)
    sizes = log_sizes(tmp_path)
    append_line(tmp_path / "metrics.jsonl", {"step": 3})
    assert restore(tmp_path, sizes) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == LINES
    assert not (tmp_path / "eval.jsonl").exists()


@pytest.mark.parametrize(
    ("left", "steps"),
    [(None, []), (b"", []), (LINES[:12], [1]), (LINES[:17], [1]), (b"\xff\x00 not a line", []), (b"[]\n" + LINES, [1])],
    ids=["gone", "empty", "a line less", "half a line less", "garbage", "a foreign line"],
)
def test_a_lost_or_damaged_log_is_a_note(tmp_path, left, steps):
    if left is not None:
        (tmp_path / "metrics.jsonl").write_bytes(left)
    notices = restore(tmp_path, {"metrics.jsonl": len(LINES), "eval.jsonl": 0})
    assert ("metrics.jsonl lost" in "".join(notices)) == (left is None or len(left) < len(LINES))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == steps
    append_line(tmp_path / "metrics.jsonl", {"step": 3})
    assert read_lines(tmp_path / "metrics.jsonl")[-1] == {"step": 3}


@pytest.mark.parametrize("name", ["../victim.txt", "/victim.txt", "config.yaml"])
def test_names_of_a_hostile_state_are_not_looked_at(tmp_path, name):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("precious")
    restore(run, {name if name != "/victim.txt" else str(victim): 0})
    assert victim.read_text() == (run / "config.yaml").read_text() == "precious"


def test_what_a_log_links_to_is_not_written(tmp_path):
    victim, run = tmp_path / "victim.txt", tmp_path / "run"
    victim.write_bytes(LINES)
    run.mkdir()
    (run / "metrics.jsonl").hardlink_to(victim)
    (run / "eval.jsonl").symlink_to(victim)
    restore(run, {"metrics.jsonl": 12, "eval.jsonl": 0})
    append_line(run / "metrics.jsonl", {"step": 2})
    append_line(run / "eval.jsonl", {"step": 2})
    assert victim.read_bytes() == LINES
