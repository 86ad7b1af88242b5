"""Models side by side: the same prompts and noise, with what each costs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from comfy_api.latest import io, ui
from torch import Tensor

from .draw import Bar, Caller, encode, file_of, lines, to_image
from .families import HIDDEN, seed_input

MOST = 4
PROMPTS = "a small red ring on a blue background\na large yellow star, top left\na green heart"
SEEN = 160  # pixels: smaller pictures are enlarged


@dataclass
class Column:
    """One model: its pictures, and what they cost."""

    name: str
    caller: Caller
    memory: int
    """bytes of its weights, as they lie in memory"""
    size: int | None
    """bytes of its file"""
    pictures: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def facts(self) -> list[str]:
        """What stands under the column. The time is a median, the range that of all pictures."""
        ms = [1000 * s for s in self.seconds]
        steps = f"{self.caller.steps} step" + "s" * (self.caller.steps > 1)
        return [
            steps + (f", CFG {self.caller.cfg:g}" if self.caller.cfg != 1 else ""),
            f"{statistics.median(ms):.4g} ms ({min(ms):.4g} to {max(ms):.4g}, n = {len(ms)})",
            f"memory {self.memory / 2**20:.1f} MiB",
            "file unknown" if self.size is None else f"file {self.size / 2**20:.1f} MiB",
        ]


class OneStepCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        more = [
            io.Model.Input(f"model_{i}", optional=True, tooltip="Another one, of the same latents and text encoder.")
            for i in range(2, MOST + 1)
        ]
        return io.Schema(
            node_id="OneStepCompare",
            display_name="OneStep Compare",
            category="OneStep",
            description="Draws the same prompts from the same noise with up to four models, each called as its recipe "
            "says, into one labelled image: a column for each, with steps, time, memory and file size under it.",
            search_aliases=["compare models", "XY plot", "side by side", "grid", "contact sheet", "quality check"],
            inputs=[
                io.Model.Input("model_1", tooltip="A model of OneStep's loaders, or a public few-step model."),
                io.Clip.Input("clip", tooltip="Reads the prompts for all of them."),
                io.Vae.Input("vae", tooltip="Decodes for all of them."),
                io.Latent.Input("latent", tooltip="An empty latent: the size of the pictures."),
                io.String.Input(
                    "prompts", multiline=True, default=PROMPTS, tooltip="One a line; each makes a row of pictures."
                ),
                io.String.Input(
                    "names",
                    multiline=True,
                    default="",
                    tooltip="What stands above the columns, one a line. Empty: the names of the files.",
                ),
                seed_input("Seed of the first row's noise; each further row has the next one. Times are taken anew."),
                *more,
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="All in one labelled picture."),
                io.String.Output(display_name="report", tooltip="What stands under the columns, as text."),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, model_1, clip, vae, latent, prompts, names, seed, **more) -> io.NodeOutput:
        given = {k: m for k, m in sorted(({"model_1": model_1} | more).items()) if m is not None}
        rows = lines(prompts, "prompts")
        for k, m in given.items():
            check_latents(k, m.model.latent_format, model_1.model.latent_format)
        columns = [column(i, m, Caller(m, clip, cls.hidden, k), names) for i, (k, m) in enumerate(given.items())]
        bar = Bar(len(columns) * (len(rows) + 1))
        for c in columns:
            c.caller(encode(clip, rows[0]), latent, 1, seed)  # the first call loads, and warms up
            bar.step()
        for i, prompt in enumerate(rows):  # in turn, so that whatever else the machine does meets all alike
            words = encode(clip, prompt)
            for c in columns:
                made = c.caller(words, latent, 1, (seed + i) % 2**64)
                c.seconds.append(c.caller.seconds)
                c.pictures.append(vae.decode(made)[0].cpu())
                bar.step()
        report = "\n".join(f"{c.name}: {', '.join(c.facts())}" for c in columns)
        return io.NodeOutput(to_image(sheet(rows, columns)), report, ui=ui.PreviewText(report))


def check_latents(name: str, found, first) -> None:
    """Raise ValueError where latents (their LatentFormats) are not those of the first model, which its VAE reads."""
    said, wanted = ((f.latent_channels, f.scale_factor) for f in (found, first))
    if said != wanted:
        raise ValueError(
            f"{name}: its latents have {said[0]} channels, scaled by {said[1]:g}; those of model_1 {wanted[0]}, scaled "
            f"by {wanted[1]:g}. One VAE decodes them all: compare models that share it."
        )


def column(i: int, model, caller: Caller, names: str) -> Column:
    """The i-th of them, named by the i-th line of names, else by its file."""
    given, file = [n.strip() for n in names.splitlines()], file_of(model)
    name = given[i] if i < len(given) and given[i] else (file.stem if file else f"model {i + 1}")
    return Column(name, caller, model.model_size(), file.stat().st_size if file else None)


def sheet(rows: list[str], columns: list[Column]):
    """A PIL image: a row for each prompt, which stands left of it, a column for each model."""
    from PIL import Image, ImageDraw, ImageFont

    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    first = columns[0].pictures[0]
    scale = max(1, -(-SEEN // min(first.shape[:2])))
    height, width = (scale * n for n in first.shape[:2])
    left, top, gap, line = 170, 36, 10, 18
    wide = max(width, *(int(font.getlength(f)) for c in columns for f in c.facts()), int(bold.getlength(" " * 8)))
    foot = top + len(rows) * (height + gap)
    canvas = Image.new("RGB", (left + len(columns) * (wide + 2 * gap), foot + 4 * line + 2 * gap), "white")
    draw = ImageDraw.Draw(canvas)
    for j, c in enumerate(columns):
        x = left + j * (wide + 2 * gap) + gap
        middle = x + wide // 2
        draw.text((middle, top - 10), fitting(c.name, bold, wide), "black", bold, anchor="ms")
        for i, picture in enumerate(c.pictures):
            array = (picture[..., :3].clamp(0, 1) * 255).round().byte().numpy()
            shown = Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(shown, (x + (wide - width) // 2, top + i * (height + gap)))
        for i, fact in enumerate(c.facts()):
            draw.text((middle, foot + gap + i * line), fact, "#333", font, anchor="ma")
    for i, text in enumerate(rows):
        draw.multiline_text((8, top + i * (height + gap) + 8), wrapped(text, font, left - 16, height), "black", font)
    return canvas


def fitting(text: str, font, width: int) -> str:
    """As much of a text's beginning as is no wider."""
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text


def wrapped(text: str, font, width: int, height: int) -> str:
    """A text in lines no wider, as many as fit in the height."""
    out = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if font.getlength(longer) <= width or not out[-1]:
            out[-1] = fitting(longer, font, width)
        else:
            out.append(fitting(word, font, width))
    return "\n".join(out[: max(1, height // 18)])
