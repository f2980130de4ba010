# Trains GPT-2 124M on OpenWebText. This is the run of nanoGPT's README.
# On one machine with 8 GPUs of at least 40 GB:
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences x 1024 tokens x 40 micro-batches: 491,520 tokens per iteration, close to GPT-2's 0.5M
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
