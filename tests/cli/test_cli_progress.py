"""Progress on stderr, in plain lines."""

import pytest

from arm_cli.progress import EVERY, ProgressBar, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("arm_cli.progress.time.monotonic", lambda: now[0])
    return now


def test_a_line_shows_the_rate_and_time_left_of_this_session_only(clock):
    with ProgressBar("train", 100, "steps", start=40) as counter:
        clock[0] += 5
        counter.advance(10)
    assert counter.line("loss 0.5") == "train: 50/100 steps, 2 steps/s, 25 s left, loss 0.5"


def test_plain_lines_are_printed_at_intervals(clock, capsys):
    with ProgressBar("embed", 1000, "images") as counter:
        for _ in range(100):
            clock[0] += EVERY / 10
            counter.advance(1)
        counter.say("a line of its own")
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) - 1 <= 11
    assert lines[-1] == "a line of its own"
    assert lines[0].startswith("embed: 4/1000 images, 1 images/s, 16:36 left")  # early, without waiting


def test_the_rate_excludes_the_first_step_which_compiles(clock):
    with ProgressBar("train", 100, "steps") as counter:
        clock[0] += 60
        counter.advance(1)
        assert "0.0167 steps/s" in counter.line()
        clock[0] += 2
        counter.advance(1)
    assert counter.line() == "train: 2/100 steps, 0.5 steps/s, 3:16 left"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ProgressBar("embed", 10, "images") as counter:
        counter.advance(4, "loss 0.5 [not markup]")
        counter.say("a line of its own")
    shown = capsys.readouterr().err
    assert "4/10" in shown
    assert "a line of its own" in shown
    assert "loss 0.5 [not markup]" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01"), (3_723, "1:02:03")]
)
def test_durations_are_printed_like_a_clock(seconds, text):
    assert duration(seconds) == text
