# The first run of the README: Python's standard library by characters, minutes on two CPU cores.
# Many small steps beat few large ones here: for the same time, 12 x 128 characters a step end at a loss higher by 0.18.
out_dir = 'out-python-char'
eval_interval = 600
eval_iters = 50
log_interval = 50

dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 6e-3
max_iters = 3600
lr_decay_iters = 3600
min_lr = 1e-5
beta2 = 0.98
warmup_iters = 100
