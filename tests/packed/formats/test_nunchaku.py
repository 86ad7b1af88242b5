"""nunchaku's int4 files: packed here number by number from its kernels' description, then read and run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.header import CheckpointError
from distill.packed.formats import nunchaku, read
from distill.packed.weight import QuantizedWeight, layers


def pack_codes(codes: np.ndarray) -> Tensor:
    """-8..7, (N, K) -> qweight. Where number (n, k) goes: mma m16n8k64, one 16-byte load for each lane."""
    n_all, k_all = codes.shape
    out = np.zeros(n_all * k_all // 2, np.uint8)
    for n in range(n_all):
        warp, row = divmod(n, 128)
        fragment, row = divmod(row, 16)
        second, row = divmod(row, 8)  # which of two n8 tiles; the lane's row
        for k in range(k_all):
            step, column = divmod(k, 64)
            right, column = divmod(column, 32)  # which of two k32 halves
            lane, nibble = divmod(column, 8)
            tile = ((warp * (k_all // 64) + step) * 8 + fragment) * 32 + row * 4 + lane
            byte = tile * 16 + (second * 2 + right) * 4 + nibble // 2
            out[byte] |= (int(codes[n, k]) & 15) << 4 * (nibble % 2)
    return torch.from_numpy(out.view(np.int8)).view(n_all, k_all // 2)


def pack_vector(v: Tensor) -> Tensor:
    """(N, G) -> (G, N) as a warp holds its scales: lane l has rows 16 (l / 4) + 2 (l % 4) + {0, 1, 8, 9}."""
    n, groups = v.shape
    out = torch.empty(n * groups, dtype=v.dtype)
    for warp in range(n // 128):
        for g in range(groups):
            for lane in range(32):
                for i, row in enumerate((0, 1, 8, 9)):
                    where = ((warp * groups + g) * 32 + lane) * 4 + i
                    out[where] = v[warp * 128 + 16 * (lane // 4) + 2 * (lane % 4) + row, g]
    return out.view(groups, n)


def pack_factor(m: Tensor, down: bool) -> Tensor:
    """D (R, K) or U (N, R) -> tiles of 16 x 16, a lane's eight numbers together; the tile of D is (rank, channel)."""
    rows, columns = m.shape
    c, r = (columns, rows) if down else (rows, columns)
    out = torch.empty(c * r, dtype=m.dtype)
    for i in range(rows):
        for j in range(columns):
            (a, y), (b, x) = divmod(i, 16), divmod(j, 16)
            tile = b * (r // 16) + a if down else a * (r // 16) + b
            lane = (y % 8) * 4 + (x % 8) // 2
            out[(tile * 32 + lane) * 8 + (y // 8) * 4 + (x // 8) * 2 + x % 2] = m[i, j]
    return out.view(c, r)


def pack_modulation(codes: np.ndarray) -> Tensor:
    """0..15, (N, K) -> int32 (N/4, K/2): rows in fours, 64 columns each; column 8 j + i of 32 is nibble j of word i."""
    n_all, k_all = codes.shape
    out = np.zeros(n_all * k_all // 4, np.uint16)
    for n in range(n_all):
        for k in range(k_all):
            inside = k % 32
            word = ((n // 4 * (k_all // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + inside % 8
            out[word] |= int(codes[n, k]) << 4 * (inside // 8)
    return torch.from_numpy(out.view(np.int32)).view(n_all // 4, k_all // 2)


class Original:
    """One SVDQuant layer before packing: everything nunchaku's kernel computes from."""

    def __init__(self, n: int, k: int, seed: int, smooth: Tensor | None = None, rank: int = 16):
        g = torch.Generator().manual_seed(seed)
        self.codes = torch.randint(-8, 8, (n, k), generator=g)
        self.scale = (torch.rand(n, k // 64, generator=g) * 0.1 + 0.01).bfloat16()
        self.smooth = (torch.rand(k, generator=g) + 0.5).bfloat16() if smooth is None else smooth
        self.down = (torch.randn(rank, k, generator=g) * 0.05).bfloat16()
        self.up = (torch.randn(n, rank, generator=g) * 0.05).bfloat16()
        self.bias = torch.randn(n, generator=g).bfloat16()

    def tensors(self, name: str, version: int = 1) -> dict[str, Tensor]:
        smooth, down, up = [("smooth", "lora_down", "lora_up"), ("smooth_factor", "proj_down", "proj_up")][version - 1]
        return {
            f"{name}.qweight": pack_codes(self.codes.numpy()),
            f"{name}.wscales": pack_vector(self.scale),
            f"{name}.{smooth}": pack_vector(self.smooth[:, None]).flatten(),
            f"{name}.{smooth}_orig": torch.zeros(self.smooth.shape[0]).bfloat16(),
            f"{name}.{down}": pack_factor(self.down, True),
            f"{name}.{up}": pack_factor(self.up, False),
            f"{name}.bias": pack_vector(self.bias[:, None]).flatten(),
        }

    def __call__(self, x: Tensor, shift: float = 0.0) -> Tensor:
        w = (self.codes.view(len(self.codes), -1, 64) * self.scale.double()[..., None]).flatten(1)
        low = x @ self.down.double().t() @ self.up.double().t()
        return (x + shift) / self.smooth.double() @ w.t() + low + self.bias.double()


class Modulation:
    """A W4A16 layer: its weight as the model means it, and as nunchaku stores it."""

    def __init__(self, parts: int, k: int, seed: int):
        g = torch.Generator().manual_seed(seed)
        n = parts * k
        self.parts, self.codes = parts, torch.randint(0, 16, (n, k), generator=g)
        self.scale = (torch.rand(n, k // 64, generator=g) * 0.1 + 0.01).bfloat16()
        self.bias = torch.randn(n, generator=g).bfloat16()

    def tensors(self, name: str) -> dict[str, Tensor]:
        def interleave(t: Tensor) -> Tensor:
            return t.view(self.parts, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)

        added = torch.zeros(self.parts)
        added[1] = added[-2] = 1
        bias = (self.bias.view(self.parts, -1) + added[:, None]).flatten().float()
        scale = interleave(self.scale)
        return {
            f"{name}.qweight": pack_modulation(interleave(self.codes).numpy()),
            f"{name}.wscales": scale.t().contiguous(),
            f"{name}.wzeros": (-7 * scale.float()).bfloat16().t().contiguous(),
            f"{name}.bias": interleave(bias),
        }

    def __call__(self, x: Tensor) -> Tensor:
        scale, zero = self.scale.double()[..., None], (-7 * self.scale.float()).bfloat16().double()[..., None]
        w = (self.codes.view(len(self.codes), -1, 64) * scale + zero).flatten(1)
        return x @ w.t() + self.bias.double()


def run(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    w = QuantizedWeight.from_tensors(weights, name).dequantize(torch.float64)
    return x @ w.t() + weights[f"{name}.bias"].double()


def close(a: Tensor, b: Tensor) -> bool:
    return (a - b).norm() < 1e-6 * b.norm()


def inputs(k: int) -> Tensor:
    return torch.randn(5, k, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_the_layouts_are_undone():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (256, 192), generator=g)
    assert torch.equal(nunchaku.codes(pack_codes(codes.numpy())).int() - 8, codes.int())
    v = torch.randn(256, 3, generator=g)
    assert torch.equal(nunchaku._in_order(pack_vector(v)), v)
    down, up = torch.randn(32, 128, generator=g), torch.randn(256, 48, generator=g)
    assert torch.equal(nunchaku.factor(pack_factor(down, True), True), down)
    assert torch.equal(nunchaku.factor(pack_factor(up, False), False), up)
    codes = torch.randint(0, 16, (12, 192), generator=g)
    assert torch.equal(nunchaku.modulation_codes(pack_modulation(codes.numpy())).int(), codes.int())


def flux(version: int, k: int = 128) -> tuple[dict[str, Tensor], dict]:
    """A Flux of one block of each sort, and the functions its layers compute."""
    one, two = "transformer_blocks.0", "single_transformer_blocks.0"
    shared = (torch.rand(k, generator=torch.Generator().manual_seed(8)) + 0.5).bfloat16()
    names = {
        "qkv_proj": ("attn.to_qkv", 3 * k, k),
        "out_proj": ("attn.to_out.0", k, k),
        "mlp_fc1": ("ff.net.0.proj", 2 * k, k),
        "mlp_fc2": ("ff.net.2", k, 2 * k),
    }
    made = {f"{one}.{n}": Original(*size, seed) for seed, (n, (_, *size)) in enumerate(names.items())}
    made |= {f"{two}.{n}": Original(*size, seed + 9, None if "2" in n or "out" in n else shared)
             for seed, (n, (_, *size)) in enumerate(names.items())}  # fmt: skip
    made |= {f"{one}.norm1.linear": Modulation(6, k, 30), f"{two}.norm.linear": Modulation(3, k, 31)}
    tensors = {}
    for name, original in made.items():
        block, _, part = name.partition(".0.")
        if version == 1 or part not in names:
            tensors |= original.tensors(name)
        elif block == "single_transformer_blocks":
            new = {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out"}.get(part, part)
            tensors |= original.tensors(f"{block}.0.{new}", 2)
        else:
            tensors |= original.tensors(f"{block}.0.{names[part][0]}", 2)
    norm = "norm_q" if version == 1 else "attn.norm_q"
    tensors |= {f"{one}.{norm}.weight": torch.ones(128), f"{two}.{norm}.weight": torch.ones(128)}
    tensors |= {
        "x_embedder.weight": torch.ones(k, 64),
        "norm_out.linear.weight": torch.arange(2 * k * k).view(2 * k, k),
    }
    return tensors, made


@pytest.mark.parametrize("version", [1, 2])
def test_flux_computes_what_nunchaku_computes(tmp_path, version):
    tensors, made = flux(version)
    save_file(tensors, tmp_path / "m")
    loaded = read(tmp_path / "m")
    assert loaded.kind == "nunchaku"
    w, x, wide = loaded.weights, inputs(128), inputs(256)
    one, two = "transformer_blocks.0", "single_transformer_blocks.0"
    assert close(run(w, "double_blocks.0.img_attn.qkv", x), made[f"{one}.qkv_proj"](x))
    assert close(run(w, "double_blocks.0.img_attn.proj", x), made[f"{one}.out_proj"](x))
    assert close(run(w, "double_blocks.0.img_mlp.0", x), made[f"{one}.mlp_fc1"](x))
    assert close(run(w, "double_blocks.0.img_mlp.2", wide), made[f"{one}.mlp_fc2"](wide, 0.171875))
    assert close(run(w, "double_blocks.0.img_mod.lin", x), made[f"{one}.norm1.linear"](x))
    assert close(run(w, "single_blocks.0.modulation.lin", x), made[f"{two}.norm.linear"](x))
    together = torch.cat([made[f"{two}.{n}"](x) for n in ("qkv_proj", "mlp_fc1")], 1)
    assert close(run(w, "single_blocks.0.linear1", x), together)
    together = made[f"{two}.out_proj"](x) + made[f"{two}.mlp_fc2"](wide, 0.171875)
    assert close(run(w, "single_blocks.0.linear2", torch.cat([x, wide], 1)), together)
    assert w["double_blocks.0.img_attn.norm.query_norm.weight"].shape == (128,)
    assert torch.equal(w["final_layer.adaLN_modulation.1.weight"][0], tensors["norm_out.linear.weight"][128])
    assert "img_in.weight" in w and not any("transformer_blocks" in k for k in w)


def test_sdxl_and_qwen_come_apart_into_q_k_and_v(tmp_path):
    qkv, x = Original(384, 128, 40), inputs(128)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    tensors = qkv.tensors(f"{name}.to_qkv", 2) | {"conv_in.weight": torch.ones(8, 4, 3, 3)}
    tensors |= Original(128, 256, 41).tensors(name.replace("attn1", "ff.net.2"), 2)
    save_file(tensors, tmp_path / "sdxl")
    w = read(tmp_path / "sdxl").weights
    ldm = "input_blocks.4.1.transformer_blocks.0."
    assert sorted(layers(w)) == [f"{ldm}{n}" for n in ("attn1.to_k", "attn1.to_q", "attn1.to_v", "ff.net.2")]
    assert close(torch.cat([run(w, f"{ldm}attn1.to_{c}", x) for c in "qkv"], 1), qkv(x))
    wide = inputs(256)
    assert close(run(w, f"{ldm}ff.net.2", wide), Original(128, 256, 41)(wide))  # after a GEGLU: no shift
    mod, tensors = Modulation(6, 128, 42), qkv.tensors("transformer_blocks.0.attn.add_qkv_proj", 2)
    save_file(tensors | mod.tensors("transformer_blocks.0.img_mod.1"), tmp_path / "qwen")
    w = read(tmp_path / "qwen").weights
    assert close(run(w, "transformer_blocks.0.img_mod.1", x), mod(x))
    assert close(run(w, "transformer_blocks.0.attn.add_v_proj", x), qkv(x)[:, 256:])


def test_z_image(tmp_path):
    x, wide, name = inputs(128), inputs(256), "layers.0"
    qkv, out, up, down = Original(384, 128, 60), Original(128, 128, 61), Original(512, 128, 62), Original(128, 256, 63)
    up.bias = torch.zeros(512).bfloat16()
    tensors = {"cap_embedder.1.weight": torch.ones(2, 2), "all_final_layer.2-1.linear.weight": torch.ones(3, 3)}
    for part, layer in (("to_qkv", qkv), ("to_out.0", out)):
        tensors |= layer.tensors(f"{name}.attention.{part}", 2)
    for part, layer in (("0.proj", up), ("2", down)):
        tensors |= layer.tensors(f"{name}.feed_forward.net.{part}", 2)
    tensors |= {f"noise_refiner.0.attention.to_{c}.weight": torch.full((2, 2), float(i)) for i, c in enumerate("qkv")}
    tensors["noise_refiner.0.feed_forward.net.0.proj.weight"] = torch.arange(8.0).view(4, 2)
    save_file(tensors, tmp_path / "m")
    w = read(tmp_path / "m").weights
    assert close(run(w, f"{name}.attention.qkv", x), qkv(x)) and close(run(w, f"{name}.attention.out", x), out(x))
    assert close(run(w, f"{name}.feed_forward.w2", wide), down(wide))  # after a SwiGLU: no shift
    assert f"{name}.feed_forward.w1.bias" not in w
    zeros = {f"{name}.feed_forward.{p}.bias": torch.zeros(256) for p in ("w1", "w3")}
    assert close(torch.cat([run(w | zeros, f"{name}.feed_forward.{p}", x) for p in ("w3", "w1")], 1), up(x))
    assert w["noise_refiner.0.attention.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert w["noise_refiner.0.feed_forward.w1.weight"].flatten().tolist() == [4, 5, 6, 7]
    assert "final_layer.linear.weight" in w and not any("net." in k or "to_" in k for k in w)


def test_what_is_not_covered_says_so(tmp_path):
    layer = Original(128, 128, 50).tensors("layers.0.attention.to_out.0", 2)
    save_file(layer, tmp_path / "other")
    with pytest.raises(CheckpointError, match="another model than Flux.1, Qwen-Image, Z-Image or SDXL"):
        read(tmp_path / "other")
    name = "single_transformer_blocks.0.mlp_fc1"
    layer = Original(128, 128, 50).tensors(name)
    layer[f"{name}.wscales"] = torch.zeros(8, 128).to(torch.float8_e4m3fn)
    save_file(layer, tmp_path / "fp4")
    with pytest.raises(CheckpointError, match="NVFP4.*svdq-int4"):
        read(tmp_path / "fp4")
    save_file(Original(128, 128, 50).tensors(name), tmp_path / "half")
    with pytest.raises(CheckpointError, match="half of its layers"):
        read(tmp_path / "half")
    layer = Original(128, 128, 50).tensors(name)
    layer[f"{name}.bias"] = torch.zeros(127)
    save_file(layer, tmp_path / "shape")
    with pytest.raises(CheckpointError, match="bias is torch.float32 .127,., not .128,."):
        read(tmp_path / "shape")


def test_wrong_tensors_are_refused(tmp_path):
    """Tensors dropped, cut, of other types and shapes: each file reads, or is refused by name. Deterministic."""
    sound, rng, refused = flux(1)[0], random.Random(3), 0
    path = tmp_path / "m"
    for _ in range(150):
        tensors = dict(sound)
        for name in rng.sample(sorted(tensors), rng.choice((1, 1, 2))):
            t = tensors.pop(name)
            change = rng.randrange(6)
            if change:
                dtype = rng.choice((torch.int8, torch.int32, torch.bfloat16, torch.float8_e4m3fn, torch.float32))
                new = (t[:-1], t.flatten(), t[None], t.float().to(dtype), torch.zeros(()).to(dtype))[change - 1]
                tensors[name] = new.clone().contiguous()
        save_file(tensors, path)
        try:
            assert read(path).kind in ("nunchaku", "dense")
        except CheckpointError as e:
            assert str(e).startswith(str(path))
            refused += 1
    assert refused > 50
