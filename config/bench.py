# Measures the speed of this machine: GPT-2 124M on random tokens, in the loop of train.py.
# The last line of the output is one JSON object. On the CPU of a machine with a GPU add
# --gradient_accumulation_steps=1.
#     python train.py config/bench.py
#     python train.py config/bench.py --batch_size=64 --profile=True
#     torchrun --standalone --nproc_per_node=8 train.py config/bench.py
import torch

dataset = None
out_dir = 'out-bench'  # only --profile writes there
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40 if torch.cuda.is_available() else 1  # a CPU would take hours
max_iters = 20  # the first quarter warms up and does not count
warmup_iters = 0
