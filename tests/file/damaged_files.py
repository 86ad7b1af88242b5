"""What test_metadata.py runs in a process of its own: COUNT damaged files, in 500 MB beyond what a sound one takes.

`damaged_files.py FOLDER COUNT`: opens each and, where that succeeds, samples a picture. Fails on anything but a
CheckpointError of one line with the file's name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import mutants
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.backbones import load
from distill.header import CheckpointError
from distill.quantize.run import Quantize, quantize_file

FOLDER, COUNT = Path(sys.argv[1]), int(sys.argv[2])


def sample(path: Path) -> None:
    model = load(path)
    assert model.sample(["a red ring"], torch.Generator().manual_seed(0), steps=1).shape[:2] == (1, 3)


def main() -> None:
    torch.set_num_threads(1)
    dense = tiny.write(FOLDER / "student.safetensors", torch.float16, **mutants.SMALL)
    packed = FOLDER / "packed.safetensors"
    quantize_file(dense, packed, Quantize(method="rtn"))
    assert not any(mutants.refused(sample, path, CheckpointError) for path in (dense, packed))
    ways, counts = mutants.ways(dense, packed), [0, 0]
    mutants.limit_memory()

    @settings(
        max_examples=COUNT, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def check(data) -> None:
        def choose(values: list):
            return data.draw(st.sampled_from(values))

        how, file = ways[choose(list(range(len(ways))))]
        path = how(file, choose).write(FOLDER / "m.safetensors")
        counts[mutants.refused(sample, path, CheckpointError)] += 1

    check()
    print(f"{sum(counts)} files: {counts[1]} refused, {counts[0]} sampled")
    assert min(counts) > COUNT / 50


if __name__ == "__main__":
    main()
