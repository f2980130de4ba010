# Trains the model of train_shakespeare_char.py in a third of the iterations.
# It uses Muon and a learning rate that decays linearly to zero.
# README.md has measurements for 4 layers of 128 channels on two CPU cores.
# We have neither tuned nor measured the size below yet.
out_dir = 'out-shakespeare-char-fast'
eval_interval = 250
eval_iters = 200
log_interval = 10

always_save_checkpoint = False  # the model overfits: keep the best one

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-fast'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

optimizer = 'muon'
# On python_char 8e-3 was better than 1.2e-2 at 128 channels, and better than 6e-3 at 160.
# This network is wider and the norm of Muon's steps grows with the width, so the rate is lower.
learning_rate = 4e-3
lr_schedule = 'linear'
min_lr = 0.0
beta2 = 0.99
max_iters = 1500
lr_decay_iters = 1500
warmup_iters = 50
