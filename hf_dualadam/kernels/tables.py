"""Columns of the tables that tell the CUDA kernels where tensors are and what to compute.

They have a module of their own, since Triton compares the globals of a kernel's module at every launch. It ignores
other modules when it decides whether a compiled kernel is up to date, so each kernel takes :data:`LAYOUT` as an
argument.
"""

import zlib
from pathlib import Path

from triton.language import constexpr

LAYOUT = zlib.crc32(Path(__file__).read_bytes())

CHUNK = constexpr(1024)  # elements per program, 8 per thread: one 16-byte load in half precision, two in float32
BLOCK = constexpr(128)  # elements of 8-bit moments that share a scale, all in one row
BLOCKS = constexpr(2)  # blocks per program
SUMS = constexpr(4096)  # programs whose sums norm_sums_kernel adds up at a time

# Columns of the table of tensors (int64). Addresses of gradients change often, so they are in a separate list.
PARAM = constexpr(0)
EXP_AVG = constexpr(1)
EXP_AVG_SQ = constexpr(2)
STEP = constexpr(3)
NUMEL = constexpr(4)
FIRST_CHUNK = constexpr(5)  # number of chunks in the tensors before this one
SCALARS = constexpr(6)  # row in the table of scalars
OPTIONS = constexpr(7)  # row in the table of options
N_CHUNKS = constexpr(8)
ROW = constexpr(9)  # elements per row, that is, of one param[i]
CORRECTION = constexpr(10)  # of 16-bit weights
EXP_AVG_SCALE = constexpr(11)  # of 8-bit moments, like the next two
EXP_AVG_SQ_MIN = constexpr(12)
EXP_AVG_SQ_MAX = constexpr(13)
N_COLUMNS = constexpr(14)

# Columns of the table of scalars (``real``): functional.StepScalars, and 1 - beta, which float32 would round.
BETA1 = constexpr(0)
REST1 = constexpr(1)  # 1 - beta1
BETA2 = constexpr(2)
REST2 = constexpr(3)  # 1 - beta2
EPS = constexpr(4)
SIGN = constexpr(5)  # -1 to maximize
DECAY = constexpr(6)  # 1 - eta*lambda
STEP_SIZE = constexpr(7)  # eta / (1 - beta1^t)
BIAS2_RSQRT = constexpr(8)  # 1 / sqrt(1 - beta2^t)
ADAM_WEIGHT = constexpr(9)
INVERSE_WEIGHT = constexpr(10)
NORMALIZE = constexpr(11)  # 0 once the inverse weight is 0
DITHER = constexpr(12)  # states.dither of the step
N_SCALARS = constexpr(13)

# Columns of the table of options (float64), from which capturable steps compute their scalars on the device.
LR = constexpr(0)
OPTION_BETA1 = constexpr(1)
OPTION_BETA2 = constexpr(2)
OPTION_EPS = constexpr(3)
WEIGHT_DECAY = constexpr(4)
SWITCH_RATE = constexpr(5)
INVERSE_SCALE = constexpr(6)
OPTION_SIGN = constexpr(7)
OPTION_NORMALIZE = constexpr(8)
N_OPTIONS = constexpr(9)
