# Trains the model of train_shakespeare_char.py in a quarter of the iterations.
# It uses Muon, larger initial weights, a short warm-up and a learning rate that decays linearly to zero.
# With 4 layers of 128 channels and a rate of 1.2e-2 it took a fifth of the iterations (assets/notes.md).
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

init_std = 0.04
optimizer = 'muon'
# At 128 channels 1.2e-2 was better than 8e-3, at 160 on python_char no longer. This network is wider, and
# the norm of Muon's steps grows with the width, so the rate is lower.
learning_rate = 4e-3
lr_schedule = 'linear'
min_lr = 0.0
beta1 = 0.85
beta2 = 0.99
max_iters = 1250
lr_decay_iters = 1250
warmup_iters = 50
