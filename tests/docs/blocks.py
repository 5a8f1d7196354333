"""Run the shell blocks of a page as a reader would, in one folder, from top to bottom."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("pomona serve", "python -m http.server")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def commands(page: str) -> list[str]:
    """Return the commands of a page's ``sh`` blocks, with other ports than the page names."""
    for port in set(re.findall(r"(?<=[: ])(8\d{3})\b", page)):
        page = re.sub(rf"(?<=[: ]){port}\b", str(free_port()), page)
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  # ")[0].strip() for line in lines if line.strip()]


class Reader:
    """A shell that keeps its folder and its variables, with `pomona` and `python` on its path.

    A server that a command starts runs until the next server, or the end.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "bin"
        path.mkdir()
        for name, words in (("pomona", "-m pomona "), ("python", "")):
            script = path / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
            script.chmod(0o755)
        self.folder = folder
        self.state = folder / "variables"
        self.state.write_text("")
        self.env = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
        self.server: subprocess.Popen[bytes] | None = None

    def run(self, line: str) -> str:
        """Run one command; returns what it printed. It has to succeed."""
        if line.startswith(SERVERS):
            self.serve(line)
            return ""
        script = f'. "{self.state}"; {line}\nstatus=$?; export -p > "{self.state}"; '
        script += f'pwd > "{self.state}.folder"; exit $status'
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=3600,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        self.folder = Path(Path(f"{self.state}.folder").read_text().strip())
        return done.stdout

    def serve(self, line: str) -> None:
        """Start a server, and wait until it answers."""
        self.stop()
        if line.startswith("pomona serve") and "--port" not in line:
            line += f" --port {free_port()}"
        self.server = subprocess.Popen(
            ["bash", "-c", f'. "{self.state}"; exec {line}'], cwd=self.folder, env=self.env
        )
        port = int(re.findall(r"\b\d{4,5}\b", line)[-1])
        end = time.monotonic() + 300
        while self.server.poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(f"{line}: it doesn't answer")

    def stop(self) -> None:
        """End the server, as Ctrl-C does."""
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            self.server.wait(60)
            self.server = None
