"""What is encoded once is found again, whole, and drawn from the disk."""

import os
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from distill import shards
from distill.backbones import load
from distill.shards import hashed
from distill.training import cache
from distill.training.batches import image_batches, prompt_batches, prompt_rows
from distill.training.cache import in_memory, on_disk

COUNT = 10


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.write(tmp_path_factory.mktemp("file") / "m.safetensors"))


class Maker:
    """Nested rows, and which were asked for; the shard `fails` is where it is killed."""

    def __init__(self, fails=None):
        self.asked, self.fails = [], fails

    def __call__(self, numbers):
        if len(numbers) > 1 or numbers.start:  # not the one row that shows the structure
            if numbers.start == self.fails:
                raise KeyboardInterrupt
            self.asked.append(numbers.start)
        n = torch.tensor(list(numbers), dtype=torch.float32)
        return {"text": (n[:, None] + torch.arange(3.0), [n.long()]), "ids": {"flag": n > 4}, "none": None}


def test_rows_from_the_disk_are_rows_from_memory_in_any_structure(tmp_path):
    kept, mapped = in_memory(Maker(), COUNT), on_disk(tmp_path, "k", Maker(), COUNT)
    for rows in (kept, mapped):
        batch = rows[torch.tensor([9, 0, 5, 5])]
        assert len(rows) == COUNT and batch["none"] is None and isinstance(batch["text"], tuple)
        assert batch["text"][0][:, 1].tolist() == [10, 1, 6, 6] and batch["text"][1][0].tolist() == [9, 0, 5, 5]
        assert batch["ids"]["flag"].tolist() == [True, False, True, True]
    assert sorted(p.name for p in (tmp_path / "k").iterdir()) == [f"{i:06d}.safetensors" for i in range(3)]


def test_a_killed_cache_is_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        on_disk(tmp_path, "k", Maker(fails=8), COUNT)
    again = Maker()
    rows = on_disk(tmp_path, "k", again, COUNT)
    assert again.asked == [8] and rows[[8]]["text"][0].tolist() == [[8, 9, 10]]


@pytest.mark.parametrize("harm", ["a byte", "the end", "the header", "rows"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, caplog, harm):
    on_disk(tmp_path, "k", Maker(), COUNT)
    assert not caplog.records
    path = tmp_path / "k" / "000001.safetensors"
    good = path.read_bytes()
    if harm == "a byte":
        path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    elif harm == "rows":
        path.write_bytes((path.parent / "000002.safetensors").read_bytes())
    else:
        path.write_bytes(good[:-5] if harm == "the end" else b"x" + good[1:])
    again = Maker()
    on_disk(tmp_path, "k", again, COUNT)
    assert f"{path} is damaged" in caplog.text and len(caplog.records) == 1
    assert again.asked == [4] and path.read_bytes() == good


def test_half_precision_on_disk_comes_back_as_it_is_encoded(tmp_path):
    rows = on_disk(tmp_path, "k", lambda numbers: {"x": torch.tensor([[1.001]] * len(numbers))}, 3, torch.bfloat16)
    x = rows[[2]]["x"]
    assert x.dtype == torch.float32 and x.item() == 1.0
    assert sum(p.stat().st_size for p in (tmp_path / "k").iterdir()) < 200


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_batch_does_not_read_the_whole_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 64)
    on_disk(tmp_path, "k", lambda numbers: torch.ones(len(numbers), 1 << 18), 64)  # 64 MB

    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = held()
    tensors = shards.read(tmp_path / "k" / "000000.safetensors")
    assert tensors[0][40].sum() == 1 << 18
    assert held() - before < 16e6


def test_other_prompts_encoders_and_sizes_have_other_keys(tmp_path, model):
    other = load(tiny.write(tmp_path / "o.safetensors", seed=1))
    keys = [hashed([words], cache.identity(m, ["text_encoder"]), d) for words, m, d in (
        (["a", "b"], model, None), (["ab"], model, None), (["a", "b"], other, None),
        (["a", "b"], model, torch.bfloat16))]  # fmt: skip
    assert len(set(keys)) == 4
    assert keys[0] == hashed(
        [["a", "b"]], cache.identity(load(tiny.write(tmp_path / "s.safetensors")), ["text_encoder"]), None
    )


def test_prompts_and_pictures_are_encoded_once(tmp_path, model, monkeypatch):
    prompts = [f"a {size} {colour} ring" for size in ("small", "large") for colour in ("red", "green", "blue")]
    fresh = prompt_batches(model, prompts, 5)(0, torch.Generator().manual_seed(3))
    prompt_rows(model, prompts, tmp_path / "cache")
    for i, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (70, 64), colour).save(tmp_path / f"{i}.png")
    pictures = image_batches(model, tmp_path, 4, cache=tmp_path / "cache")(0, torch.Generator().manual_seed(3))
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    written = [p.stat().st_mtime_ns for p in shards]
    mapped = prompt_batches(model, prompts, 5, tmp_path / "cache")(0, torch.Generator().manual_seed(3))
    again = image_batches(model, tmp_path, 4, cache=tmp_path / "cache")(0, torch.Generator().manual_seed(3))
    assert [p.stat().st_mtime_ns for p in shards] == written and len(shards) == 3
    assert torch.equal(again["x0"], pictures["x0"]) and again["x0"].shape == model.shape(4)
    for name, v in fresh["cond"].items():
        torch.testing.assert_close(mapped["cond"][name], v)


def test_the_net_may_be_elsewhere_than_text_encoders_and_autoencoder(tmp_path):
    """The meta device stands for a GPU: what is encoded comes there, what is decoded comes from there."""
    model = load(tiny.write(tmp_path / "m.safetensors"))
    expected, null = model.encode(["a red ring"])["class_labels"], model.null
    model.move_net("meta")
    assert model.device.type == "meta" and next(model.net.parameters()).device.type == "meta"
    assert model.encode(["a red ring"])["class_labels"].device.type == "meta" and model.device.type == "meta"
    aside = {p.device.type for name in ("text_encoder", "vae") for p in model.parts[name].parameters()}
    assert aside == {"cpu"} and expected.shape == model.encode([""])["class_labels"].shape
    assert null["class_labels"].device.type == "cpu"
    assert model.to_latents(torch.zeros(1, 3, 64, 64)).device.type == "meta"
