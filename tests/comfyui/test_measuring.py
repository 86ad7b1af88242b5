"""OneStepCompare and OneStepBenchmark, through ComfyUI's API."""

import json

import numpy as np
from graphs import load
from server import node


def compared(prompts: str = "a red ring\na blue star", **models) -> dict:
    inputs = {"clip": ["load", 1], "vae": ["load", 2], "latent": ["empty", 0], "prompts": prompts, "seed": 3}
    return load("student.safetensors") | {
        "compare": node("OneStepCompare", names="first\nsecond", **inputs, **models),
        "picture": node("PreviewImage", images=["compare", 0]),
    }


def test_compare_draws_a_column_for_each_model_from_the_same_noise(client):
    graph = compared(model_1=["load", 0], model_2=["again", 0], model_4=["other", 0])
    graph |= {"again": node("TestReloaded", model=["load", 0])}
    graph |= {"other": node("OneStepLoadStudent", file="teacher.safetensors")}
    run = client.run(graph)
    assert not run.errors, run.errors
    lines = run.outputs["compare"]["text"][0].splitlines()
    assert [line.split(":")[0] for line in lines] == ["first", "second", "teacher"]
    assert "1 step, " in lines[0] and "5 steps, CFG 2, " in lines[2]
    assert all("n = 2" in line and " ms (" in line and "MiB, file " in line for line in lines), lines
    pixels = np.asarray(client.image(run.outputs["picture"]["images"][0]).convert("RGB")).astype(int)
    step = (pixels.shape[1] - 170) // 3  # 170 pixels for the prompts, then columns of one width
    columns = [pixels[40:300, 170 + step * i : 170 + step * (i + 1)] for i in range(3)]
    assert (columns[0] == columns[1]).all() and columns[0].std() > 10
    assert np.abs(columns[0] - columns[2]).max() > 10
    assert [e for e in run.events if e == ("progress", "compare")]


def test_a_recipe_before_it_says_how_a_model_is_called(client):
    graph = compared(model_1=["one", 0], model_2=["four", 0], model_3=["turbo", 0])
    graph |= {n: node("OneStepRecipe", model=["load", 0], steps=k) for n, k in (("one", 1), ("four", 4))}
    graph |= {
        "strange": node("TestForeign", file="nameless"),
        "load": node("OneStepLoadStudent", file="student.safetensors"),
    }
    graph["turbo"] = node("OneStepRecipe", model=["strange", 0], family="sd-turbo", steps=2)
    run = client.run(graph)
    assert not run.errors, run.errors
    steps = [line.split(": ")[1].split(",")[0] for line in run.outputs["compare"]["text"][0].splitlines()]
    assert steps == ["1 step", "4 steps", "2 steps"]


def test_compare_names_what_is_wrong(client):
    stranger = {"strange": node("TestForeign", file="nameless")}
    assert "no OneStep recipe" in client.run(compared(model_1=["strange", 0]) | stranger).errors["compare"]
    assert "prompts is empty" in client.run(compared("\n", model_1=["load", 0])).errors["compare"]
    other = {"other": node("OneStepLoadStudent", file="foreign.safetensors")}
    bundled = {"bundled": node("OneStepLoadStudent", file="bundled: student")}
    told = client.run(compared(model_1=["bundled", 0], model_3=["other", 0]) | other | bundled).errors["compare"]
    assert "model_3: its latents have 8 channels" in told and "those of model_1 12" in told


def test_benchmark_gives_table_plot_and_json(client):
    inputs = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], "latent": ["empty", 0], "seed": 1}
    counts = {"queries": 4, "batches": 2, "warmup": 1, "prompts": "a red ring"}
    graph = load("student.safetensors") | {
        "bench": node("OneStepBenchmark", **inputs, **counts),
        "plot": node("PreviewImage", images=["bench", 1]),
        "json": node("PreviewAny", source=["bench", 2]),
    }
    run = client.run(graph)
    assert not run.errors, run.errors
    table = run.outputs["bench"]["text"][0]
    assert all(f"| {part} " in table for part in ("text encoder", "network", "VAE", "whole picture"))
    data = json.loads(run.outputs["json"]["text"][0])
    assert data["model"] == "student" and data["batch"] == 2 and data["about"]["pixels"] == "64x64"
    assert data["latency"]["network"]["n"] == 4 and data["throughput"]["VAE"]["n"] == 2
    assert client.image(run.outputs["plot"]["images"][0]).width >= 600
