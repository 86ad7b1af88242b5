"""How long the models of a graph take, measured as `distill bench` does."""

from __future__ import annotations

import comfy.model_management as mm
from comfy_api.latest import io, ui

from .draw import Bar, Caller, encode, file_of, lines, to_image
from .families import HIDDEN, seed_input

PROMPTS = "a small red ring on a blue background\na large yellow star, top left"


class OneStepBenchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def count(name: str, default: int, least: int, tooltip: str):
            return io.Int.Input(name, default=default, min=least, max=10_000, tooltip=tooltip)

        return io.Schema(
            node_id="OneStepBenchmark",
            display_name="OneStep Benchmark",
            category="OneStep",
            description="Measures latency of one picture after the other (p50, p90, p99, each with its range) and "
            "throughput of batches; text encoder, network and VAE apart, as ComfyUI runs them on this machine.",
            search_aliases=["benchmark", "speed test", "latency", "throughput", "how fast", "profile", "MLPerf"],
            inputs=[
                io.Model.Input("model", tooltip="A model of OneStep's loaders, or a public few-step model."),
                io.Clip.Input("clip", tooltip="The text encoder to measure."),
                io.Vae.Input("vae", tooltip="The VAE to measure."),
                io.Latent.Input(
                    "latent", tooltip="An empty latent: its size is the pictures', its batch size that of the batches."
                ),
                io.String.Input("prompts", multiline=True, default=PROMPTS, tooltip="One a line, asked for in turn."),
                count("queries", 50, 1, "Pictures made one at a time. The more, the narrower the ranges."),
                count("batches", 5, 1, "Batches made one after the other, for the throughput."),
                count("warmup", 3, 1, "Pictures, and batches, before the first that counts."),
                seed_input("Seed of the first noise. Another seed measures again."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The figures as a Markdown table."),
                io.Image.Output(display_name="plot", tooltip="The time of each picture, and the percentiles."),
                io.String.Output(display_name="json", tooltip="Every time that was taken, and on which machine."),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, model, clip, vae, latent, prompts, queries, batches, warmup, seed) -> io.NodeOutput:
        from ..distill.bench import measure, plot, table

        words, caller, file = lines(prompts, "prompts"), Caller(model, clip, cls.hidden), file_of(model)
        parts = {
            "text encoder": lambda given: (encode(clip, words[given[0] % len(words)]), *given),
            "network": lambda given: caller(given[0], latent, given[2], given[1] % 2**64),
            "VAE": vae.decode,
        }
        batch, bar = len(latent["samples"]), Bar(queries + batches + 2 * warmup)
        picture = vae.decode(caller(encode(clip, words[0]), latent, 1, seed))  # also loads everything
        numbers = str(model.model_dtype()).removeprefix("torch.")
        report = measure(
            file.stem if file else type(model.model).__name__,
            parts,
            lambda number, pictures: (number, pictures),
            queries=queries,
            batches=batches,
            batch=batch,
            warmup=warmup,
            seed=seed,
            device=mm.get_torch_device(),
            about={"steps": caller.steps, "pixels": f"{picture.shape[2]}x{picture.shape[1]}", "numbers": numbers},
            told=lambda what, share: bar.step(),
        )
        text = table(report)
        return io.NodeOutput(text, to_image(plot(report)), report.to_json(), ui=ui.PreviewText(text))
