# train_shakespeare_char.py in a third of its iterations: Muon, and a learning rate that falls in a straight line to zero.
# Measured at 4 layers of 128 channels on two CPU cores (README.md has that run); this size is neither tuned nor measured yet.
out_dir = 'out-shakespeare-char-fast'
eval_interval = 250
eval_iters = 200
log_interval = 10

always_save_checkpoint = False  # it overfits: keep the best

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
learning_rate = 4e-3  # on python_char 8e-3 beat 1.2e-2 at 128 channels and 6e-3 at 160; less here, as the norm of Muon's steps grows with the width
lr_schedule = 'linear'
min_lr = 0.0
beta2 = 0.99
max_iters = 1500
lr_decay_iters = 1500
warmup_iters = 50
