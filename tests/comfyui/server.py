"""Start a real ComfyUI with this pack in an empty base folder, and drive it through its API."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PACK = Path(__file__).absolute().parents[2]
MODELS = ("diffusion_models", "checkpoints", "loras")
FOLDERS = (*(f"models/{m}" for m in MODELS), "input", "output", "user/default", "custom_nodes")
HINT = (
    "no ComfyUI found. Get one with `pip install comfy-cli && comfy install`, or clone "
    "https://github.com/comfyanonymous/ComfyUI and set COMFYUI_PATH to it (and COMFYUI_PYTHON to its interpreter)"
)


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else the folder whose custom_nodes holds this pack, else comfy-cli's default."""
    given = os.environ.get("COMFYUI_PATH")
    places = [Path(given)] if given else [PACK.parents[1], Path.home() / "comfy" / "ComfyUI"]
    return next((p.absolute() for p in places if (p / "main.py").is_file() and (p / "comfy").is_dir()), None)


def find_python(comfyui: Path) -> str:
    """COMFYUI_PYTHON, else the interpreter of ComfyUI's own environment, else this one."""
    if given := os.environ.get("COMFYUI_PYTHON"):
        return given
    names = [Path(env) / sub for env in (".venv", "venv") for sub in ("bin/python", "Scripts/python.exe")]
    return next((str(comfyui / n) for n in names if (comfyui / n).is_file()), sys.executable)


def environment() -> dict[str, str]:
    """Without PYTHONPATH: ComfyUI has a top-level module `nodes`, and so would this repository."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


class Server:
    """A ComfyUI process on a free port of 127.0.0.1. `base` holds its models, input, output and custom_nodes."""

    def __init__(self, comfyui: Path, base: Path, *more: str):
        self.base, self.log_file = base, base / "comfyui.log"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        arguments = {
            "--listen": "127.0.0.1",
            "--port": str(self.port),
            "--base-directory": str(base),
            "--database-url": f"sqlite:///{base / 'comfyui.db'}",
            "--preview-method": "latent2rgb",
        }
        flags = ["--cpu", "--disable-api-nodes", "--disable-auto-launch", *sum(arguments.items(), ()), *more]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [find_python(comfyui), "main.py", *flags],
                cwd=comfyui,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @classmethod
    def fresh(cls, comfyui: Path, base: Path, *more: str) -> Server:
        """Make the folders ComfyUI expects in `base`, link this pack into custom_nodes, start, and wait.

        more: flags of its command line."""
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "user/default/comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')  # no welcome page
        (base / "custom_nodes/onestep-nodes").symlink_to(PACK, target_is_directory=True)
        server = cls(comfyui, base, *more)
        server.wait()
        return server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text("utf-8", "replace")

    def wait(self, seconds: float = 300) -> None:
        """Until it answers. Raises RuntimeError with the end of the log where it does not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.get("/system_stats") and None
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def memory(self) -> int:
        """Bytes that the process holds of the machine's memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    def post(self, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(self.url + path, b"", method="POST"), timeout=60).close()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read()

    def json(self, path: str):
        return json.loads(self.get(path))


@contextmanager
def served() -> Iterator[Server]:
    """A ComfyUI in a folder of its own, for a script. Raises SystemExit where there is none."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit(HINT)
    with tempfile.TemporaryDirectory() as base:
        server = Server.fresh(comfyui, Path(base))
        try:
            yield server
        finally:
            server.stop()


@dataclass
class Run:
    """What came of one prompt."""

    outputs: dict = field(default_factory=dict)
    """node id -> its ui output"""
    errors: dict[str, str] = field(default_factory=dict)
    """node id -> what the user is told"""
    events: list[tuple[str, str | None]] = field(default_factory=list)
    """(type, node id) in order; binary messages (previews) have type "preview" """
    seconds: float = 0.0


class Client:
    """Queues prompts and follows them on the websocket."""

    def __init__(self, server: Server):
        import websocket

        self.server, self.id = server, uuid.uuid4().hex
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={self.id}", timeout=300)

    def run(self, graph: dict, workflow: dict | None = None) -> Run:
        """workflow: the graph as the page draws it, which what is saved carries."""
        start = time.perf_counter()
        prompt, run = self.queue(graph, workflow)
        if prompt is None:
            return run
        node = None
        while True:
            message = self.socket.recv()
            if isinstance(message, bytes):
                run.events.append(("preview", node))
                continue
            message = json.loads(message)
            kind, data = message["type"], message["data"]
            if data.get("prompt_id") != prompt:
                continue
            node = data.get("node", node)
            run.events.append((kind, data.get("node")))
            if kind == "execution_error":
                run.errors[data["node_id"]] = data["exception_message"]
            if kind in ("execution_error", "execution_success", "execution_interrupted"):
                break
        run.seconds = time.perf_counter() - start
        for _ in range(500):  # the message comes before the history has the entry
            if entry := self.server.json(f"/history/{prompt}").get(prompt):
                run.outputs = entry["outputs"]
                return run
            time.sleep(0.02)
        raise RuntimeError(f"no history for prompt {prompt}")

    def queue(self, graph: dict, workflow: dict | None = None) -> tuple[str | None, Run]:
        """POST the prompt -> its id (None where it was refused) and what its nodes were told."""
        extra = {} if workflow is None else {"extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        body = json.dumps({"prompt": graph, "client_id": self.id} | extra).encode()
        request = urllib.request.Request(f"{self.server.url}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as e:
            answer = json.loads(e.read())
        errors = {node: told(e["errors"]) for node, e in (answer.get("node_errors") or {}).items()}
        if not errors and "prompt_id" not in answer:
            errors["prompt"] = str(answer)
        return answer.get("prompt_id"), Run(errors=errors)

    def image(self, reference: dict):
        """An entry of outputs[...]["images"] -> PIL image."""
        from PIL import Image

        return Image.open(io.BytesIO(self.server.get("/view?" + urllib.parse.urlencode(reference))))

    def latent(self, reference: dict):
        """An entry of SaveLatent's outputs -> tensor (B, C, H, W)."""
        from safetensors.torch import load_file

        path = self.server.base / reference["type"] / reference["subfolder"] / reference["filename"]
        return load_file(path)["latent_tensor"]


def told(errors: list[dict]) -> str:
    return "\n".join(f"{e['message']}: {e['details']}" for e in errors)


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}
