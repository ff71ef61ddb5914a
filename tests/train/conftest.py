"""What start-up does for the program, done for these tests: the environment DeepSpeed reads, before it is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
