"""The tests are for the CPU, whatever the machine has: no GPU is visible to them, nor to any program they start."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
