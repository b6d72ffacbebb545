"""Where the wall time goes: every moment in one part, and rows of it beside the figures."""

import json

import pytest
import torch

import fastsae
from fastsae import timeline as module
from fastsae.timeline import PARTS, Timeline


def test_every_moment_belongs_to_one_part(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    timeline = Timeline()
    passes(1)
    with timeline.part("ring"):
        passes(2)
        with timeline.part("forward"):
            passes(4)
            with timeline.part("ring"):
                passes(8)
            passes(16)
        with pytest.raises(KeyError), timeline.part("input"):
            passes(32)
            raise KeyError
        passes(64)
    seconds = timeline.read()
    assert seconds == {f"seconds_{p}": s for p, s in zip(PARTS, (20, 74, 0, 0, 32, 1), strict=True)}
    passes(128)
    assert timeline.read() == {f"seconds_{p}": 128 * (p == "other") for p in PARTS}


def test_a_run_says_where_its_time_went(config):
    result = fastsae.train(config(save={"validate_every": 2000}))
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    times = [row for row in rows if row["kind"] == "time"]
    assert [row["of"] for row in times] == ["first fill", *["the loop"] * (len(times) - 2), "the end"]
    total = {part: sum(row[f"seconds_{part}"] for row in times) for part in PARTS}
    assert all(total[part] > 0 for part in PARTS)
    first = times[0]
    assert first["seconds_forward"] > 0 and first["seconds_step"] == 0
    loop = [row for row in times if row["of"] == "the loop"]
    assert all(row["seconds_step"] > 0 and row["seconds_ring"] > 0 for row in loop)
    trained = [row["step"] for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in loop] == trained


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_device_time_counts():
    timeline = Timeline(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(2):
        with timeline.part("forward"):
            for _ in range(20):
                x = x @ x * 1e-3
        with timeline.part("step"):
            x = x + 1
        seconds = timeline.read()
    assert seconds["seconds_forward"] > 5 * seconds["seconds_step"] > 0
