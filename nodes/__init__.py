"""ComfyUI's face: schemas and glue, one file per family of nodes. No maths, and no constant a file's metadata holds."""

from .benchmark import OneStepBenchmark
from .compare import OneStepCompare
from .four_bit import OneStepLoad4Bit, OneStepLoad4BitCLIP
from .load import OneStepLoadStudent
from .negative import OneStepNegative
from .quantize import OneStepQuantize
from .sample import OneStepRecipe, OneStepSample, OneStepSchedule
from .save import OneStepSaveStudent
from .train import OneStepTrainStudent

NODES = [
    OneStepLoadStudent,
    OneStepSample,
    OneStepRecipe,
    OneStepSchedule,
    OneStepNegative,
    OneStepLoad4Bit,
    OneStepLoad4BitCLIP,
    OneStepQuantize,
    OneStepTrainStudent,
    OneStepSaveStudent,
    OneStepCompare,
    OneStepBenchmark,
]
