# Trains a GPT-2 of 30M parameters on Chinese Wikipedia, on one GPU.
# First prepare the data with data/wiki_zh/prepare.py.

out_dir = 'out-wiki-zh'
dataset = 'wiki_zh'
sampler = 'epoch'

n_layer = 6
n_head = 8
n_embd = 512
block_size = 512

batch_size = 32
gradient_accumulation_steps = 4  # 65,536 tokens per iteration
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 200
max_iters = 10000
lr_decay_iters = 10000

eval_interval = 500
eval_iters = 50
log_interval = 10
always_save_checkpoint = False
