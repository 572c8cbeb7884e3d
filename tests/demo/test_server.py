"""The process around a server: stand-ins for vLLM that are ready, die, or will not go."""

from __future__ import annotations

import secrets
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from weightwire.demo import server
from weightwire.demo.server import Server, free_port
from weightwire.errors import DeadlineError, EngineLost

READY = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.pause()"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('mine', flush=True); signal.pause()"


TIDY = """
import signal, subprocess, sys
tidy = "import os, sys, time; sys.stdin.read(); time.sleep(1); os.remove(sys.argv[1])"
child = subprocess.Popen([sys.executable, "-c", tidy, "shared"], stdin=subprocess.PIPE, cwd=sys.argv[2])
signal.pause()
"""


def start(script: str, folder: Path) -> Server:
    port = free_port()
    command = [sys.executable, "-c", script, str(port), str(folder)]
    return Server(command, f"http://127.0.0.1:{port}", log=folder / "log", environment={})


def family(running: Server) -> list[psutil.Process]:
    leader = psutil.Process(running._process.pid)
    return [leader, *leader.children(recursive=True)]


@pytest.fixture(autouse=True)
def short(monkeypatch, request):
    if "once_it_has_gone" not in request.node.name:
        monkeypatch.setattr(server, "_REST_SECONDS", 0.2)


def assert_gone(processes: list[psutil.Process]) -> None:
    assert not psutil.wait_procs(processes, timeout=30)[1]


def test_it_ends_with_all_that_it_started(tmp_path):
    with start(READY, tmp_path) as running:
        running.wait_until_ready()
        processes = family(running)
    assert len(processes) == 2
    assert_gone(processes)


def test_what_its_processes_remove_once_it_has_gone_is_removed(tmp_path):
    shared = tmp_path / "shared"
    shared.touch()
    with start(TIDY, tmp_path) as running:
        deadline = time.monotonic() + 30
        while len(processes := family(running)) < 2:
            assert time.monotonic() < deadline
    assert_gone(processes)
    assert not shared.exists()


def test_it_is_stopped_when_the_body_fails(tmp_path, capsys):
    processes = []

    def fail():
        with start(READY, tmp_path) as running:
            running.wait_until_ready()
            processes.extend(family(running))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert_gone(processes)
    assert capsys.readouterr().err == ""


def test_one_that_dies_says_its_last_words(tmp_path, capsys):
    with pytest.raises(EngineLost, match="exit code 3"), start("print('no room'); exit(3)", tmp_path) as running:
        running.wait_until_ready()
    assert "no room" in capsys.readouterr().err


def test_one_that_will_not_go_is_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server, "_READY_SECONDS", 2.0)
    monkeypatch.setattr(server, "_STOP_SECONDS", 0.5)
    running = start(STUBBORN, tmp_path)
    with pytest.raises(DeadlineError), running:
        running.wait_until_ready()
    assert running._process.returncode == -signal.SIGKILL
    assert "mine" in capsys.readouterr().err


def test_a_free_port_is_none_that_the_system_gives_away(monkeypatch):
    """Such a one was somebody else's by the time that a server had been started."""
    with socket.create_server(("127.0.0.1", 0)) as given:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        assert given.getsockname()[1] >= lowest
    ports = [free_port() for _ in range(20)]
    assert all(10000 <= port < lowest for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        drawn = iter([ports[0] - 10000, ports[1] - 10000])
        monkeypatch.setattr(secrets, "randbelow", lambda most: next(drawn))
        assert free_port() == ports[1]
