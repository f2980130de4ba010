# Trains GPT-2 124M in fewer tokens than train_gpt2.py, and with more tokens per second.
# It uses Muon, a learning rate that decays linearly to zero, and micro-batches for GPUs of 80 GB.
# For GPUs of 40 GB add --batch_size=30 --gradient_accumulation_steps=16.
# The settings are from the literature, and so is beta1, Muon's momentum: not measured by us at this size.
# In 500 iterations of 4 layers of 192 channels, with a BPE, beta1=0.85, init_std=0.04 and a warm-up of 20
# were better than 0.9, 0.02 and 50 (assets/notes.md). Nobody has tried them at this size.
#     python train.py config/train_gpt2_fast.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
out_dir = 'out-gpt2-fast'
eval_interval = 1000
eval_iters = 50
log_interval = 10

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-fast'

# 491,520 tokens per iteration, as in train_gpt2.py, but in 8 micro-batches, for up to 8 GPUs
batch_size = 60
block_size = 1024
gradient_accumulation_steps = 8

optimizer = 'muon'
learning_rate = 2e-3
lr_schedule = 'linear'
min_lr = 0.0
beta1 = 0.95
warmup_iters = 250
max_iters = 18000  # 8.8 billion tokens, about one epoch of OpenWebText
lr_decay_iters = 18000
sampler = 'epoch'
