"""A long day of a server: two people's prompts, another model each time, files replaced and gone, Cancel in between."""

import random
import shutil
import sys

import pytest
import tiny
import torch
from graphs import one_step
from server import Client, Server, node

PROMPTS = 200
WARM = 60
FILES = {
    "a.safetensors": {},
    "v.safetensors": {"prediction": "v"},
    "flow.safetensors": {"prediction": "flow", "schedule": tiny.FLOW, "t_in": 1000},
}


@pytest.fixture(
    params=[(), ("--cache-lru", "3"), ("--cache-none",), ("--cache-classic",)], ids=lambda f: "".join(f) or "default"
)
def server(request, comfyui, tmp_path):
    pytest.importorskip("websocket", reason="pip install websocket-client")
    models = tmp_path / "models/diffusion_models"
    models.mkdir(parents=True)
    for name, options in FILES.items():
        tiny.write(models / name, **options)
    for seed in (1, 2):
        tiny.write(tmp_path / f"other-{seed}.safetensors", seed=seed)
    server = Server.fresh(comfyui[0], tmp_path, *request.param)
    yield server
    server.stop()


def drawn(client: Client, file: str, seed: int) -> torch.Tensor | None:
    """The latent; None where it was cancelled."""
    run = client.run(one_step(file, seed=seed))
    assert not run.errors, run.errors
    if run.events[-1][0] == "execution_interrupted":
        return None
    return client.latent(run.outputs["save"]["latents"][0])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_leak_no_wrong_picture_no_dead_server(server, tmp_path):
    models, clients, chance = tmp_path / "models/diffusion_models", [Client(server), Client(server)], random.Random(0)
    quantize = {"file": "a.safetensors", "name": "four", "method": "auto", "bits": "4", "text_encoder": True}
    made = clients[0].run({"quantize": node("OneStepQuantize", prompts="a red ring", **quantize)})
    assert not made.errors, made.errors
    files, content, expected, memory, cancelled = [*FILES, "four.safetensors"], {"a.safetensors": 0}, {}, [], 0
    for i in range(PROMPTS):
        if i % 25 == 24:  # another file by the same name
            content["a.safetensors"] = chance.choice([1, 2])
            shutil.copyfile(tmp_path / f"other-{content['a.safetensors']}.safetensors", models / "a.safetensors")
        if i % 40 == 39:  # gone: refused by name, and found again when it is back
            (models / "v.safetensors").rename(tmp_path / "away")
            refused = clients[0].run(one_step("v.safetensors", seed=i))
            assert "v.safetensors" in " ".join(refused.errors.values())
            (tmp_path / "away").rename(models / "v.safetensors")
        file, seed, client = files[i % len(files)], chance.randrange(3), clients[i % 2]
        if i % 10 == 7:  # pressed while it is queued, runs, or is done
            prompt, _ = clients[1 - i % 2].queue(one_step(files[(i + 1) % len(files)], seed=100 + i))
            server.post("/interrupt")
        x = drawn(client, file, seed)
        if x is None:
            cancelled += 1
            continue
        key = file, content.get(file), seed
        assert torch.equal(x, expected.setdefault(key, x)), (i, key)
        if i >= WARM and i % 20 == 0:
            memory.append(server.memory)
    assert len(expected) >= 12 and cancelled < 20 and server.process.poll() is None
    assert not any(torch.equal(a, b) for k, a in expected.items() for q, b in expected.items() if k != q)
    assert memory[-1] < 1.05 * memory[0], [m >> 20 for m in memory]
